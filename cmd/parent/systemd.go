package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

const (
	reportEvery = 10 * time.Second // or a third of the watchdog's time, where that is less
	firstReport = 100 * time.Millisecond
	askTimeout  = 5 * time.Second
	maxReadyz   = 64 << 10 // bytes
)

// reporter tells systemd that the parent serves. Its word for that is the answer
// of its own /readyz, so a parent that hangs is not taken for one that works.
type reporter struct {
	service sdnotify.Service
	listen  string // empty: there is nobody to ask, and only the process itself is reported
	log     *slog.Logger
}

// start reports until ctx ends or the function that it returns is called, which
// waits for the end.
func (r reporter) start(ctx context.Context) (stop func()) {
	told := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { r.run(ctx, told) })
	return func() {
		cancel()
		wg.Wait()
	}
}

// run goes on while the parent finishes its work: systemd still watches then.
func (r reporter) run(ctx, told context.Context) {
	every := reportEvery
	if w := r.service.Watchdog(); w > 0 {
		every = min(every, w/3)
	}
	wait, ready, stopping := firstReport, false, false
	for {
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if told.Err() != nil && !stopping {
			stopping = true
			r.send(ctx, sdnotify.Stopping)
		}
		text, err := r.ask(ctx)
		if err != nil {
			r.log.DebugContext(ctx, "own readiness not known", slog.Any("error", err))
			if ready {
				wait = every
			}
			continue
		}
		state := []string{sdnotify.Alive, sdnotify.Status(text)}
		if !ready {
			ready = true
			state = append(state, sdnotify.Ready)
		}
		r.send(ctx, state...)
		wait = every
	}
}

func (r reporter) send(ctx context.Context, state ...string) {
	if err := r.service.Send(state...); err != nil {
		r.log.WarnContext(ctx, "systemd not told", slog.Any("error", err))
	}
}

// ask returns one line about the enclaves, from /readyz. 503 is an answer too:
// the parent lives and waits for an enclave or a keyring.
func (r reporter) ask(ctx context.Context) (string, error) {
	if r.listen == "" {
		return "serves, without an address to ask at", nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.listen+"/readyz", nil)
	if err != nil {
		return "", fmt.Errorf("ask for readiness: %w", err)
	}
	// No proxy of the environment, no connection that is kept.
	client := http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{}).DialContext, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask for readiness: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read as far as it is of use
	var body readiness
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReadyz)).Decode(&body); err != nil {
		return "", fmt.Errorf("ask for readiness: %w", err)
	}
	return body.line(), nil
}

// readiness is what /readyz says.
type readiness struct {
	Enclaves []struct {
		Name  string `json:"name"`
		Phase string `json:"phase"`
		Code  string `json:"code"`
		Live  bool   `json:"live"`
	} `json:"enclaves"`
}

func (r readiness) line() string {
	live := 0
	var others []string
	for _, e := range r.Enclaves {
		if e.Live {
			live++
			continue
		}
		others = append(others, strings.TrimSpace(e.Name+": "+e.Phase+" "+e.Code))
	}
	text := fmt.Sprintf("%d of %d enclaves ready", live, len(r.Enclaves))
	if len(others) > 0 {
		text += " (" + strings.Join(others, ", ") + ")"
	}
	return text
}
