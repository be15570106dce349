package kms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"
)

const (
	maxRequest      = 256 << 10 // bytes; a document has up to 16 KB, a policy 32 KB
	shutdownTimeout = 5 * time.Second
)

// Options say which account and region a Server plays.
type Options struct {
	Dir     string // keys, in the clear, and the CA unless CertDir names another folder
	CertDir string

	Account string // 12 digits
	Region  string // as eu-central-1, of the partition aws

	// Root is the root certificate of the software NSM, the only one that
	// attestation documents may chain to.
	Root *x509.Certificate

	// Credentials looks an access key up. It is called for every request, so
	// that credentials can change and expire.
	Credentials func(accessKeyID string) (Credential, bool)

	Now      func() time.Time             // default: time.Now
	Encoding Encoding                     // of CiphertextForRecipient
	Faults   func(operation string) Fault // called for every request, before its signature is checked; nil: none
	Logger   *slog.Logger
}

var regionForm = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]$`)

func (o *Options) validate() error {
	var errs []error
	need := func(ok bool, text string) {
		if !ok {
			errs = append(errs, errors.New(text))
		}
	}
	need(o.Dir != "", "Dir is missing")
	need(accountForm.MatchString(o.Account), "Account must have 12 digits")
	need(regionForm.MatchString(o.Region), "Region is missing or malformed")
	need(o.Root != nil, "Root is missing")
	need(o.Credentials != nil, "Credentials is missing")
	need(o.Logger != nil, "Logger is missing")
	return errors.Join(errs...)
}

// Server is an emulated KMS endpoint. Two of them on one folder would not see
// each other's keys: the caller holds a lock on it.
type Server struct {
	opt    Options
	ca     *authority
	tls    *tls.Config
	keys   *keystore
	sealed atomic.Uint64 // envelopes made, for Alternate
}

// New reads the keys and the CA of the folder, making the CA where there is none.
func New(o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("set up the local KMS: %w", err)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.CertDir == "" {
		o.CertDir = o.Dir
	}
	if err := os.MkdirAll(o.CertDir, 0o700); err != nil {
		return nil, fmt.Errorf("set up the local KMS: %w", err)
	}
	s := &Server{opt: o}
	var err error
	if s.keys, err = openKeystore(filepath.Join(o.Dir, "keys"), s.keyARN); err != nil {
		return nil, fmt.Errorf("set up the local KMS: %w", err)
	}
	if s.ca, err = openAuthority(o.CertDir, o.Now()); err != nil {
		return nil, fmt.Errorf("set up the local KMS: %w", err)
	}
	if s.tls, err = s.ca.serverConfig(s.Host()); err != nil {
		return nil, fmt.Errorf("set up the local KMS: %w", err)
	}
	return s, nil
}

// Host is the name in the server's certificate, that of the real KMS.
func (s *Server) Host() string { return "kms." + s.opt.Region + ".amazonaws.com" }

// CACertificate is the CA in PEM: what an enclave of local mode has in place of
// the Amazon roots.
func (s *Server) CACertificate() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.cert.Raw})
}

// Roots is the CA as a pool.
func (s *Server) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(s.ca.cert)
	return pool
}

// TLSConfig is for tests that put another handler behind the real certificate.
func (s *Server) TLSConfig() *tls.Config { return s.tls.Clone() }

// KeyARNs lists the keys of the folder.
func (s *Server) KeyARNs() []string {
	ids := s.keys.ids()
	for i, id := range ids {
		ids[i] = s.keyARN(id)
	}
	return ids
}

func (s *Server) arnPrefix() string {
	return "arn:aws:kms:" + s.opt.Region + ":" + s.opt.Account + ":key/"
}

func (s *Server) keyARN(id string) string { return s.arnPrefix() + id }

func (s *Server) rootARN() string { return "arn:aws:iam::" + s.opt.Account + ":root" }

// Handler serves the API without TLS.
func (s *Server) Handler() http.Handler { return http.HandlerFunc(s.serve) }

// Serve serves the API over TLS until ctx ends, then closes the listener, lets
// requests finish and returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.Handler(),
		TLSConfig:         s.TLSConfig(), // net/http writes to it
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(s.opt.Logger.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		err := srv.Shutdown(grace)
		if err != nil {
			err = srv.Close()
		}
		stopped <- err
	})
	err := srv.ServeTLS(l, "", "")
	if !stop() && errors.Is(err, http.ErrServerClosed) {
		err = <-stopped
	}
	if err != nil {
		return fmt.Errorf("serve the local KMS: %w", err)
	}
	return nil
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Amzn-Requestid", newID())
	w.Header().Set("Date", s.opt.Now().UTC().Format(http.TimeFormat))
	operation, isKMS := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	if r.Method != http.MethodPost || r.URL.Path != "/" || !isKMS {
		write(w, http.StatusBadRequest, refuse("UnknownOperationException", ""))
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		write(w, http.StatusBadRequest, refuse("SerializationException", "the request cannot be read or is too long"))
		return
	}
	fault := s.fault(r.Context(), operation)
	switch fault.Kind {
	case Throttle:
		write(w, http.StatusBadRequest, refuse("ThrottlingException", "Rate exceeded"))
		return
	case InternalError:
		write(w, http.StatusInternalServerError, refuse("KMSInternalException", ""))
		return
	case DropBefore:
		panic(http.ErrAbortHandler) // net/http's way to close a connection without an answer
	case NoFault, DropAnswer:
	}
	answer, apiErr := s.call(r, operation, body)
	if fault.Kind == DropAnswer {
		panic(http.ErrAbortHandler)
	}
	if apiErr != nil {
		s.opt.Logger.InfoContext(r.Context(), "local KMS refused a request",
			slog.String("operation", known(operation)), slog.String("error", apiErr.Type))
		write(w, apiErr.status(), apiErr)
		return
	}
	s.opt.Logger.DebugContext(r.Context(), "local KMS answered a request", slog.String("operation", operation))
	write(w, http.StatusOK, answer)
}

func (s *Server) fault(ctx context.Context, operation string) Fault {
	if s.opt.Faults == nil {
		return Fault{}
	}
	f := s.opt.Faults(operation)
	f.wait(ctx)
	return f
}

func (s *Server) call(r *http.Request, operation string, body []byte) (any, *apiError) {
	caller, apiErr := s.authenticate(r, body)
	if apiErr != nil {
		return nil, apiErr
	}
	run, ok := operations[operation]
	if !ok {
		return nil, refuse("UnknownOperationException", "")
	}
	return run(s, caller.PrincipalARN, body)
}

// known keeps what a stranger wrote out of the log.
func known(operation string) string {
	if _, ok := operations[operation]; ok {
		return operation
	}
	return "unknown"
}
