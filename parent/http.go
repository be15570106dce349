package parent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	httpTimeout = 10 * time.Second
	httpGrace   = time.Second // requests that run when the process ends
)

// serveHTTP answers /metrics, /healthz and /readyz until ctx ends. It closes ln.
func (p *process) serveHTTP(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler: p.handler(), ReadTimeout: httpTimeout, WriteTimeout: httpTimeout, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(p.cfg.Logger.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), httpGrace)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close() // what did not end in time is cut off
		}
	})
	err := srv.Serve(ln)
	if !stop() {
		<-ended
		return nil
	}
	return errors.Join(fmt.Errorf("serve metrics: %w", err), srv.Close())
}

func (p *process) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.metrics.registry, promhttp.HandlerOpts{Registry: p.metrics.registry}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		p.respond(r.Context(), w, http.StatusOK, map[string]bool{"alive": true})
	})
	mux.HandleFunc("GET /readyz", p.readyz)
	return mux
}

// readyz is 200 while at least one enclave is attested, has its keyring and
// answered a challenge lately; the body says what each one waits for.
func (p *process) readyz(w http.ResponseWriter, r *http.Request) {
	body := struct {
		Ready    bool     `json:"ready"`
		Enclaves []status `json:"enclaves"`
	}{}
	for _, u := range p.units {
		s := u.status()
		body.Ready = body.Ready || s.Live
		body.Enclaves = append(body.Enclaves, s)
	}
	code := http.StatusServiceUnavailable
	if body.Ready {
		code = http.StatusOK
	}
	p.respond(r.Context(), w, code, body)
}

func (p *process) respond(ctx context.Context, w http.ResponseWriter, code int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if _, err := w.Write(append(b, '\n')); err != nil {
		p.cfg.Logger.DebugContext(ctx, "answer not delivered", slog.Any("error", err))
	}
}
