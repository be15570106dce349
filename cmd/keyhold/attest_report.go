package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/refusal"
)

// configPCR is the register that holds the config's measurement.
const configPCR = 16

// attestReport is the JSON of attest. Where Verified is false, everything else
// is the enclave's word and proved by nothing.
type attestReport struct {
	Verified     bool              `json:"verified"`
	Problem      *string           `json:"problem"`
	Enclave      string            `json:"enclave"`  // address; empty for a stored document
	State        string            `json:"state"`    // likewise
	BootID       string            `json:"boot_id"`  // likewise
	Document     string            `json:"document"` // file; empty for an enclave
	ModuleID     string            `json:"module_id"`
	Time         string            `json:"time"` // of the document
	AgeSeconds   float64           `json:"age_seconds"`
	Purpose      string            `json:"purpose"`     // challenge, boot or kms
	ReceiptKey   string            `json:"receipt_key"` // empty with a kms document
	PCRs         map[string]string `json:"pcrs"`
	WantPCR16    string            `json:"want_pcr16"` // of --config; empty with --any-config
	Checks       []check           `json:"checks"`
	NotCompared  []string          `json:"not_compared"`
	Config       *config.Config    `json:"config"` // null unless PCR16 is that of --config
	Certificates []certificate     `json:"certificates"`
	Keyring      *attestedKeyring  `json:"keyring"` // null while none is open
	Lanes        []attestedLane    `json:"lanes"`
}

type attestedKeyring struct {
	Name          string `json:"name"`
	Epoch         uint32 `json:"epoch"`
	Fingerprint   string `json:"fingerprint"`
	KMSKeyARN     string `json:"kms_key_arn"`
	KeyPolicyMode string `json:"key_policy_mode"`
}

type attestedLane struct {
	Lane uint32 `json:"lane"`
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"`
}

// certificate of the chain, the root first.
type certificate struct {
	Subject   string `json:"subject"`
	NotBefore string `json:"not_before"`
	NotAfter  string `json:"not_after"`
	SHA256    string `json:"sha256"` // of the DER
}

var errInconsistent = errors.New("a part is not as wanted, although the whole was accepted")

// fill says what was shown. It sets s.refused where a single check failed
// though the document was accepted, which no known document does.
func (r *attestReport) fill(s *shown, w *wanted, o *attestOptions) {
	r.Document = o.document
	if s.live() {
		r.Enclave = o.enclave.Address
	}
	r.Checks = s.checks(w)
	r.NotCompared = unchecked(r.Checks)
	bad := failures(r.Checks)
	switch {
	case s.refused == nil && bad != "":
		s.refused = failed(bad, errInconsistent)
	case s.refused != nil && bad != "":
		s.refused = fmt.Errorf("%w; not as wanted: %s", s.refused, bad)
	}
	r.Verified = s.refused == nil
	if w.config != nil {
		pcr := config.PCR16(w.raw)
		r.WantPCR16 = hex.EncodeToString(pcr[:])
	}
	r.show(s)
	if r.PCRs["16"] == r.WantPCR16 {
		r.Config = w.config
	}
	if !r.Verified {
		text := s.refused.Error()
		r.Problem = &text
		return
	}
	if st := s.proof.statement; st != nil {
		r.Keyring = &attestedKeyring{st.Keyring, st.Epoch, hex.EncodeToString(st.Fingerprint[:]), st.KMSKeyARN, string(st.Mode)}
	}
	if s.proof.heads != nil {
		for _, h := range s.proof.heads.Lanes {
			r.Lanes = append(r.Lanes, attestedLane{h.Lane, h.Seq, hex.EncodeToString(h.Hash[:])})
		}
	}
}

// show copies what the document says.
func (r *attestReport) show(s *shown) {
	r.PCRs, r.Certificates = map[string]string{}, []certificate{}
	d := s.doc
	if d == nil {
		return
	}
	r.ModuleID, r.Time = d.ModuleID, d.Timestamp.Format(time.RFC3339Nano)
	r.AgeSeconds = s.at.Sub(d.Timestamp).Seconds()
	r.Purpose = kindOf(d.UserData)
	if len(d.PublicKey) == ed25519.PublicKeySize {
		r.ReceiptKey = hex.EncodeToString(d.PublicKey)
	}
	for _, reg := range registers {
		if v := d.PCRs[reg.number]; len(v) > 0 {
			r.PCRs[fmt.Sprint(reg.number)] = hex.EncodeToString(v)
		}
	}
	for _, der := range append(append([][]byte{}, d.CABundle...), d.Certificate) {
		sum := sha256.Sum256(der)
		c := certificate{Subject: "unreadable", SHA256: hex.EncodeToString(sum[:])}
		if cert, err := x509.ParseCertificate(der); err == nil {
			c.Subject = printable(cert.Subject.CommonName)
			c.NotBefore, c.NotAfter = cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339)
		}
		r.Certificates = append(r.Certificates, c)
	}
}

// printable keeps names that nobody has verified from steering a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// lines is a text of names and values in two columns.
type lines struct{ strings.Builder }

func (l *lines) add(name, format string, args ...any) {
	fmt.Fprintf(&l.Builder, "%-12s "+format+"\n", append([]any{name}, args...)...)
}

func (r *attestReport) text() string {
	var b lines
	r.verdict(&b)
	if r.BootID != "" {
		b.add("boot", "%s (%s)", r.BootID, r.State)
	}
	b.add("module", "%s", dash(r.ModuleID))
	b.add("document", "%s, %s old, made for: %s", r.Time, age(r.AgeSeconds), dash(r.Purpose))
	if r.ReceiptKey != "" {
		b.add("receipt key", "%s", r.ReceiptKey)
	}
	r.registers(&b)
	if len(r.NotCompared) > 0 {
		b.add("not compared", "%s", strings.Join(r.NotCompared, ", "))
	}
	for i, c := range r.Certificates {
		name := "issued"
		if i == 0 {
			name = "root"
		}
		b.add(name, "%s, %s to %s", c.Subject, dash(c.NotBefore), dash(c.NotAfter))
		if i == 0 {
			b.add("", "its SHA-256 is %s", c.SHA256)
		}
	}
	if r.Config != nil {
		for _, l := range configLines(r.Config) {
			b.add(l.name, "%s", l.text)
		}
	}
	if k := r.Keyring; k != nil {
		b.add("keyring", "%s#%d, fingerprint %s", k.Name, k.Epoch, k.Fingerprint)
		b.add("", "under KMS key %s, its policy: %s", k.KMSKeyARN, k.KeyPolicyMode)
	} else if r.Verified && r.Enclave != "" {
		b.add("keyring", "none is open yet")
	}
	for _, l := range r.Lanes {
		b.add(fmt.Sprintf("lane %d", l.Lane), "%d receipts, the newest %s", l.Seq, l.Hash)
	}
	return b.String()
}

// verdict comes first: what is proved, or what is not as wanted and what to do.
func (r *attestReport) verdict(b *lines) {
	what := "is a wanted image with the wanted config"
	if r.WantPCR16 == "" {
		what = "is a wanted image; its config was not compared"
	}
	switch {
	case r.Verified && r.Document != "":
		b.add("VERIFIED", "what made the document in %s, at its time, %s", r.Document, what)
		b.add("", "it says nothing about now")
		return
	case r.Verified:
		b.add("VERIFIED", "the enclave at %s %s, and is there now", r.Enclave, what)
		return
	}
	b.add("REFUSED", "%s", refusal.AttestFailed)
	for _, c := range r.Checks {
		if !c.OK {
			b.add("", "%s: %s", c.Name, c.Advice)
		}
	}
	b.add("", "what follows is the enclave's own word, proved by nothing")
}

func (r *attestReport) registers(b *lines) {
	for _, reg := range registers {
		v, ok := r.PCRs[fmt.Sprint(reg.number)]
		if !ok {
			continue
		}
		name := fmt.Sprintf("PCR%d", reg.number)
		b.add(name, "%s  %s", registerText(v), reg.text)
		for _, c := range r.Checks {
			if c.Name == name && !c.OK && c.Want != "" {
				b.add("wanted "+name, "%s%s", c.Want, reg.from)
			}
		}
	}
	if r.Config != nil {
		b.add("", "PCR16 is that of --config")
	}
}

// age of a document in the unit that fits.
func age(seconds float64) string {
	if seconds < 600 {
		return fmt.Sprintf("%.1f s", seconds)
	}
	const day = 24 * 3600
	if seconds >= 2*day {
		return fmt.Sprintf("%.0f days", seconds/day)
	}
	return fmt.Sprintf("%.1f hours", seconds/3600)
}

const zeroRegister = "zero"

// registerText shortens a register that was never extended.
func registerText(v string) string {
	if strings.Trim(v, "0") == "" {
		return zeroRegister
	}
	return v
}
