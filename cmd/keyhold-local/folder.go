package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/awslocal/dynoxide"
	"github.com/keyhold/keyhold/internal/refusal"
)

// Names in a run's folder. The supervisor and its children have it as their
// working directory, so that the paths of unix sockets stay short.
const (
	lockFile     = "lock"
	runFile      = "run.json"
	databaseFile = "dynamodb.db"
	nsmCAFile    = "nsm-ca.pem"   // root and key of the software NSM
	nsmRootFile  = "nsm-root.pem" // its root alone, for keyhold --test-root
	kmsFolder    = "kms"
	kmsRootFile  = "kms-root.pem"
	configFile   = "config.json"
	sockets      = "run"
	logs         = "logs"
)

// minFree is the disk space below which a run ends instead of failing somewhere
// inside the database.
const minFree = 16 << 20 // bytes

// values are what a folder belongs to: another run on it must have the same.
type values struct {
	Records   int    `json:"records"`
	Keys      int    `json:"keys"`
	BatchSize int    `json:"batch_size"`
	Algorithm string `json:"algorithm"`
	Seed      uint64 `json:"seed"` // of the random records
}

// folder is an open, locked run folder.
type folder struct {
	path     string // absolute
	lock     *os.File
	database string // the binary; empty where it was not found
}

// openFolder makes the folder where it is missing, takes its lock and changes
// into it. dir_busy: another run has it. The lock ends with the process.
func openFolder(dir string) (_ *folder, err error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open folder %s: %w", dir, err)
	}
	for _, d := range []string{path, filepath.Join(path, sockets), filepath.Join(path, logs)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make folder %s: %w", d, full(err))
		}
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock folder %s: %w", path, full(err))
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock folder %s: %w", path, refusal.DirBusy), lock.Close())
	}
	database, err := dynoxide.Find() // from where the user is: the folder is elsewhere
	if err != nil {
		database = "" // the database says so when it is started
	}
	if err := os.Chdir(path); err != nil {
		return nil, errors.Join(fmt.Errorf("open folder %s: %w", path, err), lock.Close())
	}
	return &folder{path: path, lock: lock, database: database}, nil
}

func (f *folder) Close() error { return f.lock.Close() }

// settle returns the values of the folder, which are want where it has none yet.
// dir_mismatch: it belongs to other ones.
func (f *folder) settle(want values) (values, error) {
	raw, err := os.ReadFile(runFile)
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = json.MarshalIndent(want, "", "  ")
		if err != nil {
			return values{}, fmt.Errorf("encode the run's values: %w", err)
		}
		return want, writeFile(runFile, append(raw, '\n'))
	}
	if err != nil {
		return values{}, fmt.Errorf("read the run's values: %w", err)
	}
	var have values
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&have); err != nil {
		return values{}, fmt.Errorf("read the run's values: %s is damaged; use another folder: %w", runFile, refusal.DirMismatch)
	}
	want.Seed = have.Seed
	if have != want {
		return values{}, fmt.Errorf("folder %s was made with --records %d --keys %d --batch-size %d --algorithm %s: %w",
			f.path, have.Records, have.Keys, have.BatchSize, have.Algorithm, refusal.DirMismatch)
	}
	return have, nil
}

// nsmCA returns the authority of the software NSM, made at the first run.
func nsmCA() (*nsmtest.CA, error) {
	raw, err := os.ReadFile(nsmCAFile)
	if err == nil {
		ca, err := nsmtest.ParseCA(raw, nil)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", nsmCAFile, err)
		}
		return ca, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: %w", nsmCAFile, err)
	}
	ca, err := nsmtest.NewCA(nil)
	if err != nil {
		return nil, fmt.Errorf("make the test root: %w", err)
	}
	if raw, err = ca.MarshalPEM(); err != nil {
		return nil, fmt.Errorf("make the test root: %w", err)
	}
	if err := writeFile(nsmRootFile, pemCertificate(ca.Root().Raw)); err != nil {
		return nil, err
	}
	return ca, writeFile(nsmCAFile, raw)
}

// writeFile writes a file so that a crash leaves the old one or the new one.
func writeFile(name string, data []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(name), ".tmp-")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, full(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", name, full(err)), os.Remove(tmp.Name()))
		}
	}()
	if _, err := tmp.Write(data); err != nil {
		return errors.Join(err, tmp.Close())
	}
	if err := errors.Join(tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), name)
}

// full names a full disk by its code.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", err, refusal.DiskFull)
	}
	return err
}

// checkSpace reports disk_full before the database has to.
func checkSpace(log *slog.Logger) error {
	var st unix.Statfs_t
	if err := unix.Statfs(".", &st); err != nil {
		log.Warn("free disk space unknown", slog.Any("error", err))
		return nil
	}
	if st.Bavail*uint64(st.Bsize) < minFree { //nolint:gosec // a block size is positive
		return fmt.Errorf("less than %d MiB are free for the run's folder: %w", minFree>>20, refusal.DiskFull)
	}
	return nil
}

// blameDisk gives an error its code where the disk is full: the database says
// no more than that it failed.
func blameDisk(log *slog.Logger, err error) error {
	if space := checkSpace(log); space != nil && !errors.Is(err, refusal.DiskFull) {
		return fmt.Errorf("%w: %w", space, err)
	}
	return err
}
