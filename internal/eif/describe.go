package eif

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// Info is what the metadata section holds, in nitro-cli's form. Nobody vouches
// for it: it is not measured.
type Info struct {
	ImageName      string
	ImageVersion   string
	BuildMetadata  BuildInfo
	DockerInfo     json.RawMessage // what docker inspect prints of the image that it was made of; null where there is none
	CustomMetadata json.RawMessage // an object; null where there is none
}

// BuildInfo says how an image was made.
type BuildInfo struct {
	BuildTime        string
	BuildTool        string
	BuildToolVersion string
	OperatingSystem  string
	KernelVersion    string
}

// Encode returns the section.
func (i Info) Encode() ([]byte, error) {
	b, err := json.Marshal(i)
	if err != nil {
		return nil, fmt.Errorf("encode metadata: %w", err)
	}
	return b, nil
}

// Info reads the metadata section.
func (m Image) Info() (Info, error) {
	var i Info
	if err := json.Unmarshal(m.Metadata, &i); err != nil {
		return Info{}, BadMetadata
	}
	// nitro-cli takes no section that lacks one of these.
	if i.BuildMetadata == (BuildInfo{}) || i.DockerInfo == nil || i.CustomMetadata == nil {
		return Info{}, BadMetadata
	}
	return i, nil
}

// Description is what nitro-cli describe-eif prints.
type Description struct {
	EifVersion         int
	Measurements       Measurements
	IsSigned           bool
	SigningCertificate *CertificateInfo `json:",omitempty"`
	CheckCRC           bool
	SignatureCheck     *bool `json:",omitempty"`
	ImageName          string
	ImageVersion       string
	Metadata           MetadataInfo
}

// MetadataInfo is Info as nitro-cli prints it: the custom metadata stand beside
// the others.
type MetadataInfo struct {
	BuildInfo
	DockerInfo     json.RawMessage
	CustomMetadata json.RawMessage `json:"-"`
}

// MarshalJSON puts the custom metadata behind the fields.
func (i MetadataInfo) MarshalJSON() ([]byte, error) {
	type fields MetadataInfo
	b, err := json.Marshal(fields(i))
	if err != nil {
		return nil, fmt.Errorf("encode metadata: %w", err)
	}
	custom := bytes.TrimSpace(i.CustomMetadata)
	if len(custom) <= len("{}") || custom[0] != '{' {
		return b, nil
	}
	return append(append(b[:len(b)-1], ','), custom[1:]...), nil
}

// CertificateInfo is the certificate that signed an image, as nitro-cli prints it.
type CertificateInfo struct {
	IssuerName map[string]string
	Algorithm  string
	NotBefore  string
	NotAfter   string
	Signature  string
}

// Describe returns what nitro-cli would print of m. The image came from Parse, so
// its checksum is right; one whose signature does not verify is refused.
func (m Image) Describe() (Description, error) {
	measured, err := m.Measure()
	if err != nil {
		return Description{}, err
	}
	info, err := m.Info()
	if err != nil {
		return Description{}, err
	}
	d := Description{
		EifVersion: Version, Measurements: measured, CheckCRC: true, ImageName: info.ImageName, ImageVersion: info.ImageVersion,
		Metadata: MetadataInfo{info.BuildMetadata, info.DockerInfo, info.CustomMetadata},
	}
	if m.Signature != nil {
		cert, _, err := signatureParts(m.Signature)
		if err != nil {
			return Description{}, err
		}
		verified := true // or there were no measurements
		d.IsSigned, d.SignatureCheck, d.SigningCertificate = true, &verified, describeCertificate(cert)
	}
	return d, nil
}

// longNames are those of OpenSSL, which nitro-cli prints.
//
//nolint:gochecknoglobals // never written
var longNames = map[string]string{
	"2.5.4.3": "commonName", "2.5.4.6": "countryName", "2.5.4.7": "localityName",
	"2.5.4.8": "stateOrProvinceName", "2.5.4.10": "organizationName", "2.5.4.11": "organizationalUnitName",
}

const opensslTime = "Jan _2 15:04:05 2006 GMT"

func describeCertificate(c *x509.Certificate) *CertificateInfo {
	issuer := map[string]string{}
	for _, n := range c.Issuer.Names {
		name := n.Type.String()
		if long, ok := longNames[name]; ok {
			name = long
		}
		issuer[name] = fmt.Sprint(n.Value)
	}
	algorithm := c.SignatureAlgorithm.String()
	if hash, ok := strings.CutPrefix(algorithm, "ECDSA-"); ok {
		algorithm = "ecdsa-with-" + hash
	}
	octets := make([]string, len(c.Signature))
	for i, b := range c.Signature {
		octets[i] = strings.ToUpper(hex.EncodeToString([]byte{b}))
	}
	at := func(t time.Time) string { return t.UTC().Format(opensslTime) }
	return &CertificateInfo{issuer, algorithm, at(c.NotBefore), at(c.NotAfter), strings.Join(octets, ":")}
}
