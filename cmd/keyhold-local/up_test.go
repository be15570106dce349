package main_test

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// get answers code 0 where nobody does.
func get(t *testing.T, url string) (body string, code int) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return "", 0
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		return "", 0
	}
	return string(raw), res.StatusCode
}

var (
	exportLine = regexp.MustCompile(`(?m)^export ([A-Z0-9_]+)='([^']*)'$`)
	parentLine = regexp.MustCompile(`(?m)^# parent \d+: (http://127\.0\.0\.1:\d+)/metrics /healthz /readyz$`)
)

// printed waits for what `up` prints: the environment, and where each parent is asked.
func (r *running) printed() (env map[string]string, parents []string) {
	r.t.Helper()
	r.until("the environment is printed", func() bool { return strings.Contains(r.stdout.String(), "KEYHOLD_TEST_ROOT='") })
	env = map[string]string{}
	for _, m := range exportLine.FindAllStringSubmatch(r.stdout.String(), -1) {
		env[m[1]] = m[2]
	}
	for _, m := range parentLine.FindAllStringSubmatch(r.stdout.String(), -1) {
		parents = append(parents, m[1])
	}
	return env, parents
}

func TestUpServesUntilCtrlC(t *testing.T) {
	t.Parallel()
	w := newWork(t, 400, 4, 50)
	w.holds(t, w.finish(t)) // so that there are keys, and enclaves become ready
	r := start(t, w.dir, nil, "up", "--parents", "2", "--enclaves", "2")
	env, parents := r.printed()
	if len(parents) != 2 {
		t.Fatalf("parents at %v, want two", parents)
	}
	for _, name := range []string{"KEYHOLD_CONFIG", "KEYHOLD_TEST_ROOT"} {
		if _, err := os.Stat(env[name]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(strings.TrimPrefix(env["KEYHOLD_ENCLAVE"], "unix:")); err != nil {
		t.Errorf("KEYHOLD_ENCLAVE: %v", err)
	}
	if _, code := get(t, env["KEYHOLD_DYNAMODB_ENDPOINT"]); code == 0 {
		t.Error("nobody answers at KEYHOLD_DYNAMODB_ENDPOINT")
	}
	for _, url := range parents {
		if body, code := get(t, url+"/healthz"); code != http.StatusOK {
			t.Errorf("%s/healthz: %d %s", url, code, body)
		}
		r.until("both enclaves are ready", func() bool { return live(t, url) == 2 })
		if body, code := get(t, url+"/metrics"); code != http.StatusOK || !strings.Contains(body, `keyhold_enclave_up{enclave="enclave-1"} 1`) {
			t.Errorf("%s/metrics: %d, want enclave-1 up", url, code)
		}
	}
	r.signal("supervisor", syscall.SIGINT)
	r.mustEnd(0, "")
	if said := r.stderr.String(); said != "" {
		t.Errorf("it said %q at a good end", said)
	}
	w.holds(t, w.finish(t))
}

// live counts the enclaves that a parent's /readyz calls live; it must be 200 where there is one.
func live(t *testing.T, url string) (n int) {
	t.Helper()
	body, code := get(t, url+"/readyz")
	var ready struct {
		Ready    bool
		Enclaves []struct{ Live bool }
	}
	if code == 0 || json.Unmarshal([]byte(body), &ready) != nil {
		return 0
	}
	for _, e := range ready.Enclaves {
		if e.Live {
			n++
		}
	}
	if ready.Ready != (n > 0) || ready.Ready != (code == http.StatusOK) {
		t.Errorf("/readyz: %d %s", code, body)
	}
	return n
}
