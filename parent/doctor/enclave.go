package doctor

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/parent/watch"
)

const (
	nextJournal = "systemctl status keyhold-enclave, journalctl -u keyhold-enclave"
	// A leaf certificate of the NSM begins a few seconds before its document, and a
	// challenge is at most five minutes old (attestation.MaxAge).
	clockWarn = time.Second
	clockFail = 5 * time.Second
)

// images are the wanted ones.
func (e *exam) images() (list []eif.Measurements, err error) {
	for _, file := range e.Measurements {
		raw, err := e.read(file)
		if err != nil {
			return nil, err
		}
		m, err := eif.ParseMeasurements(raw)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		list = append(list, m)
	}
	for _, pcr := range e.PCR0 {
		list = append(list, eif.Measurements{PCR0: pcr})
	}
	return list, nil
}

func (e *exam) imageFile(ctx context.Context) Finding {
	if e.EIF == "" || e.Measure == nil {
		return skip("no image file is set")
	}
	next := "copy keyhold.eif and measurements.json of one build: deploy/install --dist FOLDER"
	info, err := fs.Stat(e.Files, inside(e.EIF))
	if err != nil || !info.Mode().IsRegular() {
		return fail(e.EIF+" is not there or cannot be read", next)
	}
	wanted, err := e.images()
	if err != nil {
		return fail(err.Error(), next)
	}
	if len(wanted) == 0 {
		return skip("no measurements are set to compare the image with")
	}
	got, err := e.Measure(ctx, e.EIF)
	if err != nil {
		return fail(e.EIF+" is no whole image: "+err.Error(), next)
	}
	for _, want := range wanted {
		if watch.Same(got, want) {
			return good("%s measures as wanted: PCR0 %s...", e.EIF, got.PCR0[:16])
		}
	}
	return fail(e.EIF+" is not one of the wanted images: it measures as PCR0 "+got.PCR0, next)
}

func (e *exam) imageMemory(context.Context) Finding {
	if e.EIF == "" {
		return skip("no image file is set")
	}
	info, err := fs.Stat(e.Files, inside(e.EIF))
	if err != nil {
		return skip(e.EIF + " is not there")
	}
	need := watch.NeedsMiB(info.Size())
	if e.MemoryMiB < need {
		return fail(fmt.Sprintf("the image has %d MiB, so the enclave needs %d MiB; %d are set", info.Size()>>20, need, e.MemoryMiB),
			"raise KEYHOLD_MEMORY_MIB in /etc/keyhold/enclave.env and memory_mib in allocator.yaml")
	}
	return good("the image needs %d MiB of the %d MiB that are set", need, e.MemoryMiB)
}

func (e *exam) configFile(context.Context) Finding {
	if e.Config == "" {
		return skip("no config file is set")
	}
	next := "put the config of keyhold config build there, byte by byte"
	raw, err := e.read(e.Config)
	if err != nil {
		return fail(e.Config+" is not there or cannot be read", next)
	}
	parsed, err := config.Parse(raw)
	if err != nil {
		return fail(e.Config+" is no valid config", "keyhold config validate "+e.Config)
	}
	e.config = parsed
	pcr := config.PCR16(raw)
	return good("keyring %s, PCR16 %s...", parsed.Keyring, hex.EncodeToString(pcr[:8]))
}

// loadConfig reads the config where its own check was not asked for.
func (e *exam) loadConfig() *config.Config {
	if e.config == nil && e.Config != "" {
		if raw, err := e.read(e.Config); err == nil {
			if parsed, err := config.Parse(raw); err == nil {
				e.config = parsed
			}
		}
	}
	return e.config
}

// find asks nitro-cli for the enclave, once.
func (e *exam) find(ctx context.Context) error {
	if e.listed || e.Enclaves == nil {
		return nil
	}
	list, err := e.Enclaves(ctx)
	for i := range list {
		if list[i].CID == e.CID {
			e.enclave, e.listed = &list[i], true
			return nil
		}
	}
	e.listed = err == nil
	return err
}

func (e *exam) enclaveRunning(ctx context.Context) Finding {
	if e.Enclaves == nil {
		return skip("nitro-cli is not asked")
	}
	switch err := e.find(ctx); {
	case err != nil:
		return warn("nitro-cli could not list the enclaves", "try again in a moment: E39 comes while one starts or ends; else "+nextJournal)
	case e.enclave == nil:
		return fail(fmt.Sprintf("no enclave with context id %d runs", e.CID), "systemctl start keyhold-enclave; "+nextJournal)
	case e.enclave.Name != watch.Name(e.CID):
		return fail(fmt.Sprintf("context id %d belongs to an enclave that Keyhold did not start", e.CID), "set another KEYHOLD_ENCLAVE_CID, or end that one")
	case e.enclave.State != watch.StateRunning:
		return fail("the enclave is about to end", nextJournal)
	}
	return good("enclave %d runs with %d MiB and %d vCPUs", e.CID, e.enclave.MemoryMiB, e.enclave.CPUs)
}

func (e *exam) enclaveMode(ctx context.Context) Finding {
	if err := e.find(ctx); err != nil || e.enclave == nil {
		return skip("no enclave runs")
	}
	if e.enclave.Flags != watch.FlagsNone {
		return fail("DEBUG MODE: this host reads the enclave's memory, its PCR0 is zero, KMS releases nothing to it",
			"take KEYHOLD_DEBUG_MODE out of /etc/keyhold/enclave.env, then systemctl restart keyhold-enclave")
	}
	return good("not in debug mode")
}

func (e *exam) enclaveAnswers(ctx context.Context) Finding {
	if err := e.find(ctx); e.Probe == nil || err == nil && e.listed && e.enclave == nil {
		return skip("no enclave runs")
	}
	begin := e.Now()
	remote, err := e.Probe(ctx)
	if err != nil {
		return fail("the enclave does not answer: "+reason(err), nextJournal+"; it is restarted by itself after 45 s")
	}
	took := e.Now().Sub(begin)
	if !remote.IsZero() {
		// The answer was made between the two readings of our clock.
		e.remote, e.local, e.source = remote, begin.Add(took/2), "the enclave's"
	}
	return good("the enclave answered in %d ms", took.Milliseconds())
}

func (e *exam) clock(context.Context) Finding {
	if e.remote.IsZero() {
		return skip("there is no clock to compare with: neither enclave nor metadata service answered")
	}
	offset := e.local.Sub(e.remote)
	next := "chronyc tracking, systemctl restart chronyd"
	text := fmt.Sprintf("this host's clock is %v off %s", offset.Round(time.Millisecond), e.source)
	// The metadata service tells whole seconds.
	slack := time.Duration(0)
	if e.source != "the enclave's" {
		slack = time.Second
	}
	switch {
	case offset.Abs() > clockFail+slack:
		return fail(text+": fresh attestation documents look as if they were not valid yet, or too old", next)
	case offset.Abs() > clockWarn+slack:
		return warn(text, next)
	}
	return good("%s", text)
}

// reason is an error in one line.
func reason(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	return text
}
