package kms

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	service    = "kms"
	terminator = "aws4_request"
	amzDate    = "20060102T150405Z"
	maxSkew    = 5 * time.Minute // AWS: signatures of most services are good for five minutes
)

// Credential is what one access key stands for.
type Credential struct {
	SecretAccessKey string
	SessionToken    string    // empty for long-lived keys
	PrincipalARN    string    // of the role or user, or arn:aws:iam::<account>:root
	Expires         time.Time // zero: never
}

// authorization is a parsed Authorization header.
type authorization struct {
	accessKey, date, region string
	signedHeaders           []string
	signature               []byte
}

func parseAuthorization(header string) (authorization, *apiError) {
	incomplete := refuse("IncompleteSignatureException", "Authorization header is not of the form that AWS4-HMAC-SHA256 has.")
	rest, ok := strings.CutPrefix(header, algorithm+" ")
	if !ok {
		return authorization{}, incomplete
	}
	fields := map[string]string{}
	for part := range strings.SplitSeq(rest, ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if _, twice := fields[name]; !ok || twice {
			return authorization{}, incomplete
		}
		fields[name] = value
	}
	scope := strings.Split(fields["Credential"], "/")
	signature, err := hex.DecodeString(fields["Signature"])
	if len(fields) != 3 || len(scope) != 5 || err != nil || len(signature) != sha256.Size || fields["SignedHeaders"] == "" {
		return authorization{}, incomplete
	}
	if scope[3] != service || scope[4] != terminator {
		return authorization{}, refuse("InvalidSignatureException", "Credential should be scoped to correct service: 'kms'.")
	}
	return authorization{
		accessKey:     scope[0],
		date:          scope[1],
		region:        scope[2],
		signedHeaders: strings.Split(fields["SignedHeaders"], ";"),
		signature:     signature,
	}, nil
}

// authenticate checks the signature version 4 of a request and answers who made
// it. The order of the checks decides which error a caller sees, as with AWS.
func (s *Server) authenticate(r *http.Request, body []byte) (Credential, *apiError) {
	header := r.Header.Get("Authorization")
	if header == "" {
		return Credential{}, refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	auth, apiErr := parseAuthorization(header)
	if apiErr != nil {
		return Credential{}, apiErr
	}
	credential, known := s.opt.Credentials(auth.accessKey)
	token := r.Header.Get("X-Amz-Security-Token")
	if !known || !sameString(token, credential.SessionToken) {
		return Credential{}, refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	now := s.opt.Now()
	if !credential.Expires.IsZero() && !now.Before(credential.Expires) {
		return Credential{}, refuse("ExpiredTokenException", "The security token included in the request is expired")
	}
	if apiErr := s.checkScope(r, auth, now); apiErr != nil {
		return Credential{}, apiErr
	}
	if apiErr := checkSignedHeaders(r, auth.signedHeaders); apiErr != nil {
		return Credential{}, apiErr
	}
	want := sign(credential.SecretAccessKey, auth, r, body)
	if !hmac.Equal(want, auth.signature) {
		return Credential{}, refuse("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	}
	return credential, nil
}

func sameString(a, b string) bool { return hmac.Equal([]byte(a), []byte(b)) }

func (s *Server) checkScope(r *http.Request, auth authorization, now time.Time) *apiError {
	date := r.Header.Get("X-Amz-Date")
	signed, err := time.Parse(amzDate, date)
	if err != nil {
		return refuse("IncompleteSignatureException", "X-Amz-Date is missing or not of ISO 8601's basic form.")
	}
	if auth.date != date[:8] {
		return refuse("InvalidSignatureException", "Date in Credential scope does not match X-Amz-Date.")
	}
	if auth.region != s.opt.Region {
		return refuse("InvalidSignatureException", "Credential should be scoped to a valid region.")
	}
	if now.Sub(signed) > maxSkew {
		return refuse("InvalidSignatureException", "Signature expired.")
	}
	if signed.Sub(now) > maxSkew {
		return refuse("InvalidSignatureException", "Signature not yet current.")
	}
	return nil
}

// checkSignedHeaders asks for the host and for every X-Amz-* header, in order.
func checkSignedHeaders(r *http.Request, signed []string) *apiError {
	incomplete := refuse("IncompleteSignatureException", "SignedHeaders must be sorted and name host and every X-Amz-* header.")
	if !slices.IsSorted(signed) || !slices.Contains(signed, "host") {
		return incomplete
	}
	for name := range r.Header {
		name = strings.ToLower(name)
		if strings.HasPrefix(name, "x-amz-") && !slices.Contains(signed, name) {
			return incomplete
		}
	}
	return nil
}

// sign computes the signature that the request must carry. The payload hash is
// that of the body that arrived, whatever X-Amz-Content-Sha256 claims.
func sign(secret string, auth authorization, r *http.Request, body []byte) []byte {
	var canonical strings.Builder
	canonical.WriteString(r.Method + "\n" + r.URL.EscapedPath() + "\n" + r.URL.RawQuery + "\n")
	for _, name := range auth.signedHeaders {
		canonical.WriteString(name + ":" + headerValue(r, name) + "\n")
	}
	hash := sha256.Sum256(body)
	canonical.WriteString("\n" + strings.Join(auth.signedHeaders, ";") + "\n" + hex.EncodeToString(hash[:]))

	digest := sha256.Sum256([]byte(canonical.String()))
	scope := strings.Join([]string{auth.date, auth.region, service, terminator}, "/")
	text := strings.Join([]string{algorithm, r.Header.Get("X-Amz-Date"), scope, hex.EncodeToString(digest[:])}, "\n")

	key := []byte("AWS4" + secret)
	for _, step := range []string{auth.date, auth.region, service, terminator, text} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(step))
		key = mac.Sum(nil)
	}
	return key
}

// headerValue gives the canonical value: net/http moves two headers elsewhere.
func headerValue(r *http.Request, name string) string {
	switch name {
	case "host":
		return r.Host
	case "content-length":
		return strconv.FormatInt(r.ContentLength, 10)
	}
	values := slices.Clone(r.Header.Values(name))
	for i, v := range values {
		values[i] = strings.Join(strings.Fields(v), " ")
	}
	return strings.Join(values, ",")
}
