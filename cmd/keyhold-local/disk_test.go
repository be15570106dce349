package main_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// smallDisk mounts a file system of its own, or skips where that is not permitted.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Skipf("a full disk needs a small one, which this user may not mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// fill leaves nothing free and returns the file that takes it all.
func fill(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "ballast")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, block := range [][]byte{make([]byte, 1<<20), make([]byte, 4<<10)} {
		for err == nil {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	return name
}

func TestAFullDiskEndsTheRunAndTheSameCommandGoesOnWhenThereIsSpace(t *testing.T) {
	whole(t)
	t.Parallel()
	for _, tc := range []struct {
		name string
		when func(r *running) bool
	}{
		{"from the start", nil},
		{"as keys are made", func(r *running) bool { return r.signal("parent-0", 0) != 0 }},
		{"at the import", func(r *running) bool { return strings.Contains(r.stderr.String(), "keys: ") }},
		{"while it signs", func(r *running) bool { return r.signs(0) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := newWork(t, 8000, 10, 25)
			disk := smallDisk(t, "96m")
			w.dir = filepath.Join(disk, "run")
			var ballast string
			if tc.when == nil {
				ballast = fill(t, disk)
			}
			r := w.start(t)
			if tc.when != nil {
				r.until(tc.name, func() bool { return tc.when(r) })
				r.signal("parent-0", unix.SIGSTOP) // or a fast one may be done before the disk is full
				ballast = fill(t, disk)
				r.signal("parent-0", unix.SIGCONT)
			}
			r.mustEnd(1, "disk_full: ")
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			w.holds(t, w.finish(t))
		})
	}
}
