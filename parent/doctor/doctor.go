// Package doctor looks at a host that is to run an enclave and says what is
// missing and what to do next. It changes nothing, and repeats no secret.
package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/watch"
)

// checkTimeout bounds one check.
const checkTimeout = 30 * time.Second

// Result is how a check ended.
type Result string

// The results.
const (
	OK   Result = "ok"
	Warn Result = "warn" // works, and should be looked at
	Fail Result = "fail"
	Skip Result = "skip" // could not be looked at; the text says why
)

// A Finding is what one check found.
type Finding struct {
	ID     string `json:"id"`
	Result Result `json:"result"`
	Text   string `json:"text"`
	Next   string `json:"next,omitempty"` // what to do; with Warn and Fail
}

// Settings are those of the host's services.
type Settings struct {
	Config       string   // measured config file
	EIF          string   // image file
	Measurements []string // files of wanted images
	PCR0         []string // wanted images by PCR0, in hex
	CID          uint32   // of the enclave
	MemoryMiB    int
	CPUs         int
	Listen       string // address of the parent's HTTP; empty for none
	User         string // of the enclave's supervisor
}

// Host is how the doctor touches the machine. A field that is nil makes its
// checks skip.
type Host struct {
	Files fs.FS // of "/"
	// NitroVersion is what nitro-cli --version prints; Enclaves are those of
	// describe-enclaves, which may be incomplete with an error.
	NitroVersion func(context.Context) (string, error)
	Enclaves     func(context.Context) ([]watch.Enclave, error)
	// Measure measures an image file.
	Measure func(ctx context.Context, path string) (eif.Measurements, error)
	// LocalCID is this machine's vsock context id.
	LocalCID func() (uint32, error)
	// Probe makes one round trip to the enclave and returns its clock.
	Probe func(context.Context) (time.Time, error)
	// HTTP reaches the metadata service.
	HTTP func(*http.Request) (*http.Response, error)
	// Credentials fetches those of the instance role and returns when they expire.
	Credentials func(context.Context) (time.Time, error)
	// Tables returns nil where all tables are there, active and as they should be.
	Tables func(context.Context) error
	// TLS makes a TLS connection to port 443 of a host and ends it.
	TLS func(ctx context.Context, host string) error
	// Listen returns nil where a TCP address is free; Ready asks the parent that
	// may listen there.
	Listen func(ctx context.Context, address string) error
	Ready  func(ctx context.Context, address string) (string, error)
	// Disk returns the free bytes of the file system that holds path.
	Disk func(path string) (uint64, error)
	// OpenFiles is the hard limit on open files of this process.
	OpenFiles func() (uint64, error)
	// Now is the wall clock. Nil is time.Now.
	Now func() time.Time
}

// exam is one look at a host. Later checks use what earlier ones found.
type exam struct {
	Host
	Settings
	config  *config.Config
	enclave *watch.Enclave // nil where it does not run, or nobody can say
	listed  bool           // whether nitro-cli could say
	remote  time.Time      // a clock that can be trusted more than ours
	local   time.Time      // our clock at the same moment
	source  string         // whose clock remote is
}

// checks in their order. An id is part of the interface.
//
//nolint:gochecknoglobals // a table that is never written
var checks = []struct {
	id  string
	run func(*exam, context.Context) Finding
}{
	{"nitro_device", (*exam).nitroDevice},
	{"nitro_cli", (*exam).nitroCLI},
	{"allocator_file", (*exam).allocatorFile},
	{"allocator_memory", (*exam).allocatorMemory},
	{"allocator_cpus", (*exam).allocatorCPUs},
	{"image_file", (*exam).imageFile},
	{"image_memory", (*exam).imageMemory},
	{"config_file", (*exam).configFile},
	{"vsock", (*exam).vsock},
	{"enclave_running", (*exam).enclaveRunning},
	{"enclave_mode", (*exam).enclaveMode},
	{"enclave_answers", (*exam).enclaveAnswers},
	{"imds", (*exam).imds},
	{"credentials", (*exam).credentials},
	{"clock", (*exam).clock},
	{"tables", (*exam).tables},
	{"kms_endpoint", (*exam).kmsEndpoint},
	{"parent_port", (*exam).parentPort},
	{"disk", (*exam).disk},
	{"open_files", (*exam).openFiles},
}

// IDs returns the ids of all checks in their order.
func IDs() []string {
	ids := make([]string, 0, len(checks))
	for _, c := range checks {
		ids = append(ids, c.id)
	}
	return ids
}

// Report is what all checks found, in their order.
type Report struct {
	OK       bool      `json:"ok"` // nothing failed
	Findings []Finding `json:"checks"`
}

// Err is nil where nothing failed, else refusal.HostUnfit with the ids.
func (r Report) Err() error {
	var ids []string
	for _, f := range r.Findings {
		if f.Result == Fail {
			ids = append(ids, f.ID)
		}
	}
	if ids == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", strings.Join(ids, ", "), refusal.HostUnfit)
}

// Run makes the checks of only, or all where that is empty.
func Run(ctx context.Context, h Host, s Settings, only []string) (Report, error) {
	for _, id := range only {
		if !slices.Contains(IDs(), id) {
			return Report{}, fmt.Errorf("there is no such check; there are %s: %w", strings.Join(IDs(), ", "), refusal.UsageWrong)
		}
	}
	if h.Now == nil {
		h.Now = time.Now
	}
	e := &exam{Host: h, Settings: s}
	r := Report{OK: true}
	for _, c := range checks {
		if len(only) > 0 && !slices.Contains(only, c.id) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return r, fmt.Errorf("check %s: %w", c.id, err)
		}
		f := e.check(ctx, c.run)
		f.ID = c.id
		r.OK = r.OK && f.Result != Fail
		r.Findings = append(r.Findings, f)
	}
	return r, nil
}

func (e *exam) check(ctx context.Context, run func(*exam, context.Context) Finding) Finding {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return run(e, ctx)
}

// JSON writes the report for programs.
func (r Report) JSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(r); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// Print writes the report for people.
func (r Report) Print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	count := map[Result]int{}
	var err error
	for _, f := range r.Findings {
		count[f.Result]++
		_, bad := fmt.Fprintf(t, "%s\t%s\t%s\n", f.Result, f.ID, f.Text)
		err = errors.Join(err, bad)
		if f.Next != "" {
			_, bad = fmt.Fprintf(t, "\t\tnext: %s\n", f.Next)
			err = errors.Join(err, bad)
		}
	}
	_, bad := fmt.Fprintf(t, "\n%d ok, %d to look at, %d wrong, %d not looked at\n", count[OK], count[Warn], count[Fail], count[Skip])
	if err = errors.Join(err, bad, t.Flush()); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

func good(text string, args ...any) Finding {
	return Finding{Result: OK, Text: fmt.Sprintf(text, args...)}
}

func skip(text string) Finding { return Finding{Result: Skip, Text: text} }

func warn(text, next string) Finding { return Finding{Result: Warn, Text: text, Next: next} }

func fail(text, next string) Finding { return Finding{Result: Fail, Text: text, Next: next} }
