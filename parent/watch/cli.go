package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/internal/refusal"
	"github.com/keyhold/keyhold/parent/watch/sdnotify"
)

// Time limits of one call of nitro-cli. run-enclave itself waits for the boot
// signal for a time that grows with the image.
const (
	runTimeout       = 3 * time.Minute
	describeTimeout  = 20 * time.Second
	terminateTimeout = 30 * time.Second
	pipeDelay        = 5 * time.Second // its daemon may hold the pipes open after it has ended
)

// maxOutput bounds what is kept of an output, in bytes.
const maxOutput = 1 << 20

// NitroCLI runs AWS's nitro-cli. The zero value finds it on PATH.
type NitroCLI struct {
	Path string // "" is nitro-cli
}

// An Enclave is what describe-enclaves prints of one.
type Enclave struct {
	Name         string `json:"EnclaveName"`
	ID           string `json:"EnclaveID"`
	CID          uint32 `json:"EnclaveCID"`
	CPUs         int    `json:"NumberOfCPUs"`
	MemoryMiB    int    `json:"MemoryMiB"`
	State        string `json:"State"`
	Flags        string `json:"Flags"`
	Measurements eif.Measurements
}

// States and flags as nitro-cli prints them.
const (
	StateRunning = "RUNNING"
	FlagsNone    = "NONE"
	FlagsDebug   = "DEBUG_MODE"
)

// A CLIError is a call of nitro-cli that failed. It keeps codes and no text: what
// nitro-cli prints goes to its own log.
type CLIError struct {
	Command string   // run-enclave, ...
	Codes   []string // E36, ...: in the order in which they were printed
	cause   error
}

// Error names command and codes.
func (e *CLIError) Error() string {
	return fmt.Sprintf("nitro-cli %s: codes %v: %v", e.Command, e.Codes, e.cause)
}

// Unwrap gives every failure of nitro-cli its code in Keyhold's table.
func (e *CLIError) Unwrap() []error { return []error{refusal.NitroCLI, e.cause} }

// codePattern finds the codes in what nitro-cli prints: "[ E36 ] Enclave boot failure".
var codePattern = regexp.MustCompile(`\[ (E\d{2}) \]`)

// call runs nitro-cli. Its outputs are returned with an error as well.
func (c NitroCLI) call(ctx context.Context, timeout time.Duration, args ...string) (stdout []byte, err error) {
	path := c.Path
	if path == "" {
		path = "nitro-cli"
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // G204: a program of the operator's choice, and no shell
	var out, errs limited
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay, cmd.Env = &out, &errs, pipeDelay, sdnotify.Without(os.Environ())
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
		err = nil // the enclave's own process has the pipes still
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		e := &CLIError{Command: args[0], cause: err}
		for _, m := range codePattern.FindAllSubmatch(errs.Bytes(), -1) {
			if code := string(m[1]); !slices.Contains(e.Codes, code) {
				e.Codes = append(e.Codes, code)
			}
		}
		return out.Bytes(), e
	}
	return out.Bytes(), nil
}

// limited keeps the first maxOutput bytes.
type limited struct{ bytes.Buffer }

// Write implements io.Writer and never fails.
func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, maxOutput-l.Len()))])
	return len(p), nil
}

// Version returns what nitro-cli --version prints, as "Nitro CLI 1.4.2".
func (c NitroCLI) Version(ctx context.Context) (string, error) {
	out, err := c.call(ctx, describeTimeout, "--version")
	if err != nil {
		return "", err
	}
	return string(bytes.TrimSpace(out)), nil
}

// Describe lists the enclaves of this host. With an error the list may hold some
// of them, and an enclave that it lacks may be there: nitro-cli could not ask all.
func (c NitroCLI) Describe(ctx context.Context) ([]Enclave, error) {
	out, err := c.call(ctx, describeTimeout, "describe-enclaves")
	list, bad := parseEnclaves(out)
	if bad != nil && err == nil {
		return nil, &CLIError{Command: "describe-enclaves", cause: bad}
	}
	return list, err
}

// parseEnclaves reads what describe-enclaves prints.
func parseEnclaves(out []byte) ([]Enclave, error) {
	var list []Enclave
	if json.Unmarshal(out, &list) != nil || list == nil { // null is no list without enclaves
		return nil, errors.New("its output is not the JSON that it prints")
	}
	return list, nil
}

// DescribeEIF measures an image file as nitro-cli does.
func (c NitroCLI) DescribeEIF(ctx context.Context, path string) (eif.Measurements, error) {
	out, err := c.call(ctx, describeTimeout, "describe-eif", "--eif-path", path)
	if err != nil {
		return eif.Measurements{}, err
	}
	m, err := eif.ParseMeasurements(out)
	if err != nil {
		return eif.Measurements{}, fmt.Errorf("%w: %w", refusal.ImageMismatch, err)
	}
	return m, nil
}

// launch is one run-enclave.
type launch struct {
	name      string
	eif       string
	cid       uint32
	cpus      int
	memoryMiB int
	debug     bool
}

// run starts an enclave. It returns once the enclave has signalled that it boots.
func (c NitroCLI) run(ctx context.Context, l launch) error {
	args := []string{
		"run-enclave", "--enclave-name", l.name, "--eif-path", l.eif, "--enclave-cid", strconv.FormatUint(uint64(l.cid), 10),
		"--cpu-count", strconv.Itoa(l.cpus), "--memory", strconv.Itoa(l.memoryMiB),
	}
	if l.debug {
		args = append(args, "--debug-mode")
	}
	_, err := c.call(ctx, runTimeout, args...)
	return err
}

// Terminate ends an enclave.
func (c NitroCLI) Terminate(ctx context.Context, id string) error {
	_, err := c.call(ctx, terminateTimeout, "terminate-enclave", "--enclave-id", id)
	return err
}

// hopeless are the codes of nitro-cli after which the same request fails again,
// by https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html: wrong
// arguments, a CPU that is not in the pool, memory below four times the image, a
// signature that does not verify.
//
// All others are tried again. E36 (no boot signal) comes when another run-enclave
// of this host listens on the same vsock port for its own signal, and E22, E27,
// E29 and E31 to E33 while CPUs and pages of an enclave that has just ended, or
// that the allocator is still reserving, are not free yet. E39 (a process did not
// answer) follows each of them and also stands alone: describe-enclaves prints it
// while any enclave of the host starts or ends.
var hopeless = []string{"E01", "E02", "E03", "E14", "E18", "E20", "E21", "E23", "E24", "E26", "E58", "E59"}

// mayHelp says whether trying again can help after err.
func mayHelp(err error) bool {
	var e *CLIError
	if !errors.As(err, &e) || errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrPermission) {
		return false
	}
	return !slices.ContainsFunc(e.Codes, func(code string) bool { return slices.Contains(hopeless, code) })
}
