// Package imds emulates the part of the EC2 instance metadata service, version
// 2, that hands out the credentials of an instance role. It refuses version 1
// and every other path. For tests and local mode only.
package imds

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"
)

const (
	tokenPath  = "/latest/api/token" //nolint:gosec // a path
	rolePath   = "/latest/meta-data/iam/security-credentials/"
	tokenName  = "X-Aws-Ec2-Metadata-Token" //nolint:gosec // the name of a header
	ttlName    = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	maxTTL     = 21600 // seconds, the limit of EC2
	tokenBytes = 8 + sha256.Size
)

// Credentials are those of the role until they expire.
type Credentials struct {
	AccessKeyID, SecretAccessKey, SessionToken string
	Expires                                    time.Time
}

// Fault is the fate of one request: the delay, then a dropped connection or an
// error status. The zero value is no fault.
type Fault struct {
	Delay  time.Duration
	Drop   bool
	Status int // as 401, 429 or 503; 0: none
}

// Options say which role the instance has.
type Options struct {
	Role string           // name, without a path
	Now  func() time.Time // default: time.Now
}

// Server is an http.Handler. Until SetCredentials there is no role, as on an
// instance without a profile.
type Server struct {
	opt Options
	key [32]byte // tokens are authentic under it, so that none is remembered

	mu          sync.Mutex
	credentials *Credentials
	updated     time.Time
	fault       func(method, path string) Fault
}

var roleForm = regexp.MustCompile(`^[\w+=,.@-]{1,64}$`)

// New makes a Server.
func New(o Options) (*Server, error) {
	if !roleForm.MatchString(o.Role) {
		return nil, errors.New("set up the local IMDS: Role is missing or malformed")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Server{opt: o}
	_, _ = rand.Read(s.key[:]) // never fails, crypto/rand
	return s, nil
}

// SetCredentials replaces what the role gets.
func (s *Server) SetCredentials(c Credentials) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.credentials, s.updated = &c, s.opt.Now()
}

// SetFault sets a function that is called for every request; nil ends faults.
func (s *Server) SetFault(f func(method, path string) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.fails(w, r) {
		return
	}
	switch {
	case r.URL.Path == tokenPath && r.Method == http.MethodPut:
		s.issueToken(w, r)
	case r.Method != http.MethodGet:
		status(w, http.StatusMethodNotAllowed)
	case !s.tokenIsGood(r.Header.Get(tokenName)):
		status(w, http.StatusUnauthorized)
	default:
		s.serveRole(w, r.URL.Path)
	}
}

func (s *Server) fails(w http.ResponseWriter, r *http.Request) bool {
	s.mu.Lock()
	fault := s.fault
	s.mu.Unlock()
	if fault == nil {
		return false
	}
	f := fault(r.Method, r.URL.Path)
	wait(r.Context(), f.Delay)
	if f.Drop {
		panic(http.ErrAbortHandler) // net/http's way to close a connection without an answer
	}
	if f.Status == 0 {
		return false
	}
	status(w, f.Status)
	return true
}

func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// issueToken refuses requests that came through a proxy, as EC2 does.
func (s *Server) issueToken(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Forwarded-For") != "" {
		status(w, http.StatusForbidden)
		return
	}
	ttl, err := strconv.Atoi(r.Header.Get(ttlName))
	if err != nil || ttl < 1 || ttl > maxTTL {
		status(w, http.StatusBadRequest)
		return
	}
	expires := s.opt.Now().Add(time.Duration(ttl) * time.Second)
	w.Header().Set(ttlName, strconv.Itoa(ttl))
	text(w, s.token(expires))
}

func (s *Server) token(expires time.Time) string {
	body := binary.BigEndian.AppendUint64(nil, uint64(expires.UnixNano()))
	return base64.URLEncoding.EncodeToString(append(body, s.mac(body)...))
}

func (s *Server) mac(body []byte) []byte {
	mac := hmac.New(sha256.New, s.key[:])
	mac.Write(body)
	return mac.Sum(nil)
}

func (s *Server) tokenIsGood(token string) bool {
	raw, err := base64.URLEncoding.DecodeString(token)
	if err != nil || len(raw) != tokenBytes || !hmac.Equal(raw[8:], s.mac(raw[:8])) {
		return false
	}
	expires := time.Unix(0, int64(binary.BigEndian.Uint64(raw))) //nolint:gosec // written by token
	return s.opt.Now().Before(expires)
}

func (s *Server) serveRole(w http.ResponseWriter, path string) {
	s.mu.Lock()
	credentials, updated := s.credentials, s.updated
	s.mu.Unlock()
	switch {
	case credentials == nil:
		status(w, http.StatusNotFound)
	case path == rolePath || path+"/" == rolePath:
		text(w, s.opt.Role)
	case path == rolePath+s.opt.Role:
		answer(w, *credentials, updated)
	default:
		status(w, http.StatusNotFound)
	}
}

func answer(w http.ResponseWriter, c Credentials, updated time.Time) {
	body, err := json.Marshal(map[string]string{
		"Code":            "Success",
		"Type":            "AWS-HMAC",
		"LastUpdated":     updated.UTC().Format(time.RFC3339),
		"AccessKeyId":     c.AccessKeyID,
		"SecretAccessKey": c.SecretAccessKey,
		"Token":           c.SessionToken,
		"Expiration":      c.Expires.UTC().Format(time.RFC3339),
	})
	if err != nil { // strings cannot fail
		status(w, http.StatusInternalServerError)
		return
	}
	text(w, string(body))
}

// text answers as EC2 does: plain text, whatever is in it. A connection that
// fails here fails the caller too.
func text(w http.ResponseWriter, body string) {
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write([]byte(body))
}

func status(w http.ResponseWriter, code int) { http.Error(w, http.StatusText(code), code) }
