package target

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/eif"
	"github.com/keyhold/keyhold/keypolicy"
)

// The files of a release. make dist writes all but the config, which needs the
// ARN of the key that the first deployment makes.
const (
	ImageFile        = "keyhold.eif"
	MeasurementsFile = "measurements.json"
	ConfigFile       = "config.json"
	ParentFile       = "keyhold-parent"
	ToolFile         = "keyhold"
	InstallFile      = "deploy/install"
	ControlFile      = "lambda/control/bootstrap"
	IngestFile       = "lambda/ingest/bootstrap"
)

// Folders of a release that the hosts do not get.
const lambdaFolder = "lambda"

// Release is one folder that make dist wrote: an image, what it measures as, and
// the programs that go with it.
type Release struct {
	Dir      string
	Arch     Arch
	PCR0     keypolicy.PCR
	PCR8     *keypolicy.PCR // the certificate that signed the image, where one did
	ImageLen int64
	Config   *config.Config // nil where there is no config yet
	PCR16    keypolicy.PCR  // zero where there is no config yet
	Files    []File         // what the hosts get, in order of the paths
}

// File is a file of the bundle with its digest.
type File struct {
	Path string // with slashes, relative to the folder
	Sum  [sha256.Size]byte
}

// Pair is what the key policy admits for this release.
func (r *Release) Pair() keypolicy.Pair { return keypolicy.Pair{PCR0: r.PCR0, PCR16: r.PCR16} }

// OpenRelease reads and checks a folder. It refuses measurements that are not
// those of the image beside them, whatever either of them says.
func OpenRelease(dir string) (*Release, error) {
	r := &Release{Dir: dir}
	var errs []error
	for _, step := range []func() error{r.readImage, r.readConfig, r.readFiles} {
		errs = append(errs, step())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("release %s: %w", dir, err)
	}
	return r, nil
}

func (r *Release) readImage() error {
	claimed, err := readMeasurements(filepath.Join(r.Dir, MeasurementsFile))
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(r.Dir, ImageFile))
	if err != nil {
		return fmt.Errorf("read the image (make dist puts it there): %w", err)
	}
	image, err := eif.Parse(raw)
	if err != nil {
		return fmt.Errorf("%s: %w", ImageFile, err)
	}
	measured, err := image.Measure()
	if err != nil {
		return fmt.Errorf("measure %s: %w", ImageFile, err)
	}
	r.ImageLen = int64(len(raw))
	if r.PCR0, err = keypolicy.ParsePCR(measured.PCR0); err != nil {
		return fmt.Errorf("measure %s: %w", ImageFile, err)
	}
	if claimed.PCR0 != r.PCR0 {
		return fmt.Errorf("%s is of another image: it says PCR0 %s, and %s measures %s", MeasurementsFile, short(claimed.PCR0), ImageFile, short(r.PCR0))
	}
	if measured.PCR8 != "" {
		pcr8, err := keypolicy.ParsePCR(measured.PCR8)
		if err != nil {
			return fmt.Errorf("measure the certificate of %s: %w", ImageFile, err)
		}
		r.PCR8 = &pcr8
	}
	r.Arch = Arch(image.Arch)
	return nil
}

// measurements is what nitro-cli build-enclave and describe-eif print.
type measurements struct{ PCR0 keypolicy.PCR }

func readMeasurements(path string) (m measurements, err error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return m, fmt.Errorf("read the measurements (make dist puts them there): %w", err)
	}
	var file struct{ Measurements map[string]string }
	if err := json.Unmarshal(raw, &file); err != nil {
		return m, fmt.Errorf("%s: not the JSON that make eif and nitro-cli print", filepath.Base(path))
	}
	text, ok := file.Measurements["PCR0"]
	if !ok {
		return m, fmt.Errorf("%s: it names no PCR0", filepath.Base(path))
	}
	if m.PCR0, err = keypolicy.ParsePCR(text); err != nil {
		return m, fmt.Errorf("%s: PCR0: %w", filepath.Base(path), err)
	}
	if m.PCR0.Zero() {
		return m, fmt.Errorf("%s: PCR0 is all zero: these are the measurements of an enclave in debug mode, to which KMS shall give nothing", filepath.Base(path))
	}
	return m, nil
}

func (r *Release) readConfig() error {
	raw, err := os.ReadFile(filepath.Join(r.Dir, ConfigFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the config: %w", err)
	}
	if r.Config, err = config.Parse(raw); err != nil {
		return fmt.Errorf("%s: %w", ConfigFile, err)
	}
	r.PCR16 = config.PCR16(raw)
	return nil
}

// readFiles lists what is in the folder. WalkDir goes in lexical order.
func (r *Release) readFiles() error {
	err := filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(r.Dir, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		switch {
		case d.IsDir() && rel == lambdaFolder:
			return filepath.SkipDir
		case d.IsDir():
			return nil
		case !d.Type().IsRegular():
			return fmt.Errorf("%s: a release holds plain files alone", rel)
		case strings.ContainsAny(rel, " \t\n\\'\""):
			return fmt.Errorf("%q: no release has a file of such a name", rel)
		}
		raw, err := os.ReadFile(path) //nolint:gosec // G122: who could change the folder meanwhile could change it before
		if err != nil {
			return err
		}
		r.Files = append(r.Files, File{Path: rel, Sum: sha256.Sum256(raw)})
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the files: %w", err)
	}
	var errs []error
	for _, want := range []string{ParentFile, ToolFile, InstallFile, ControlFile, IngestFile} {
		if _, err := os.Stat(filepath.Join(r.Dir, filepath.FromSlash(want))); err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: make dist puts it there", want))
		}
	}
	return errors.Join(errs...)
}

// fits reports whether an instance gives the enclave enough: nitro-cli wants four
// times the image (E26).
func (r *Release) fits(i Instance) error {
	if have := int64(i.EnclaveMiB) << 20; have > 0 && 4*r.ImageLen > have {
		return fmt.Errorf("release %s: an enclave needs memory of at least four times its image, and %s gives it %d MiB", r.Dir, i.Name, i.EnclaveMiB)
	}
	return nil
}

// short is enough of a register to tell it from another.
func short(p keypolicy.PCR) string { return p.String()[:12] + "..." }
