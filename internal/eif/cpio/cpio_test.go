package cpio_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/keyhold/keyhold/internal/eif/cpio"
)

func folder(name string) cpio.File { return cpio.File{Name: name, Mode: cpio.Directory | 0o755} }

func file(name, data string) cpio.File {
	return cpio.File{Name: name, Mode: cpio.Regular | 0o644, Data: []byte(data)}
}

func sample() []cpio.File {
	return []cpio.File{
		folder("dev"),
		{Name: "dev/console", Mode: cpio.CharDev | 0o600, Major: 5, Minor: 1},
		{Name: "init", Mode: cpio.Regular | 0o755, Data: []byte("\x7fELF")},
		folder("modules"),
		file("modules/01-a.ko", "a"),
		file("modules/02-b.ko", "bb"),
	}
}

func archive(t testing.TB, files []cpio.File) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := cpio.Write(&b, files); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFilesComeBackAsTheyWereWritten(t *testing.T) {
	got, err := cpio.Read(archive(t, sample()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample(), got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestTheOrderOfTheFilesDoesNotMatter(t *testing.T) {
	backwards := sample()
	slices.Reverse(backwards)
	if string(archive(t, sample())) != string(archive(t, backwards)) {
		t.Error("the same files in another order gave other bytes")
	}
}

func TestAnArchiveIsAWholeNumberOfBlocks(t *testing.T) {
	for n := range 600 { // the kernel reads several archives one behind the other, each from a multiple of four bytes
		if b := archive(t, []cpio.File{file("f", strings.Repeat("x", n))}); len(b)%512 != 0 {
			t.Fatalf("%d bytes of data: %d bytes", n, len(b))
		}
	}
}

func TestTheHeaderSaysNothingAboutTheMachine(t *testing.T) {
	b := archive(t, []cpio.File{file("init", "hello")})
	//       magic  inode   mode    uid     gid     links   mtime   size    device          of a device     name    sum
	want := "070701" + "00000001" + "000081a4" + "00000000" + "00000000" + "00000001" + "00000000" + "00000005" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000005" + "00000000" + "init\x00\x00" + "hello\x00\x00\x00" + "070701"
	if got := string(b[:len(want)]); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestWhatLinuxCouldMisreadIsNotWritten(t *testing.T) {
	for _, tc := range []struct {
		name  string
		files []cpio.File
		want  error
	}{
		{"no name", []cpio.File{file("", "")}, cpio.ErrName},
		{"an absolute name", []cpio.File{file("/init", "")}, cpio.ErrName},
		{"a way up", []cpio.File{file("../init", "")}, cpio.ErrName},
		{"up itself", []cpio.File{folder("..")}, cpio.ErrName},
		{"the root", []cpio.File{folder(".")}, cpio.ErrName},
		{"a slash at the end", []cpio.File{folder("dev/")}, cpio.ErrName},
		{"two slashes", []cpio.File{folder("dev"), file("dev//x", "")}, cpio.ErrName},
		{"a NUL", []cpio.File{file("in\x00it", "")}, cpio.ErrName},
		{"a blank", []cpio.File{file("in it", "")}, cpio.ErrName},
		{"a letter that is not ASCII", []cpio.File{file("ïnit", "")}, cpio.ErrName},
		{"the name that ends an archive", []cpio.File{file("TRAILER!!!", "")}, cpio.ErrName},
		{"a name of 4096 bytes", []cpio.File{file(strings.Repeat("x", 4096), "")}, cpio.ErrName},
		{"one name twice", []cpio.File{file("init", "a"), file("init", "b")}, cpio.ErrTwice},
		{"no folder", []cpio.File{file("modules/a.ko", "")}, cpio.ErrParent},
		{"a file as a folder", []cpio.File{file("modules", ""), file("modules/a.ko", "")}, cpio.ErrParent},
		{"setuid", []cpio.File{{Name: "init", Mode: cpio.Regular | 0o4755}}, cpio.ErrMode},
		{"a link", []cpio.File{{Name: "init", Mode: 0o120777, Data: []byte("sh")}}, cpio.ErrMode},
		{"a block device", []cpio.File{{Name: "sda", Mode: 0o060600, Major: 8}}, cpio.ErrMode},
		{"no type", []cpio.File{{Name: "init", Mode: 0o755}}, cpio.ErrMode},
		{"a folder with data", []cpio.File{{Name: "d", Mode: cpio.Directory | 0o755, Data: []byte("x")}}, cpio.ErrMode},
		{"a file with a device's number", []cpio.File{{Name: "f", Mode: cpio.Regular | 0o644, Major: 5}}, cpio.ErrMode},
		{"a device's number out of range", []cpio.File{{Name: "c", Mode: cpio.CharDev | 0o600, Major: 1 << 12}}, cpio.ErrMode},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := cpio.Write(&bytes.Buffer{}, tc.files); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

func TestNoChangeOfAnArchiveGoesUnnoticed(t *testing.T) {
	good := archive(t, sample())
	files, err := cpio.Read(good)
	if err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprint(files)
	for i := range good {
		for _, flip := range []byte{0x01, 0x20, 0x80} {
			b := bytes.Clone(good)
			b[i] ^= flip
			if files, err := cpio.Read(b); err == nil && fmt.Sprint(files) == before {
				t.Errorf("byte %d, %#x: other bytes, the same files", i, flip)
			}
		}
	}
	for n := range good {
		if _, err := cpio.Read(good[:n]); err == nil {
			t.Errorf("cut after %d bytes: taken", n)
		}
	}
	if _, err := cpio.Read(append(bytes.Clone(good), make([]byte, 512)...)); !errors.Is(err, cpio.ErrMalformed) {
		t.Errorf("a block more: %v", err)
	}
}

// The cpio program is an independent reader of the format.
func TestTheCpioProgramUnpacksTheSame(t *testing.T) {
	program, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("cpio is not installed (Debian: apt-get install cpio)")
	}
	target := t.TempDir()
	cmd := exec.CommandContext(t.Context(), program, "-i", "--quiet", "-d", "init", "modules/*")
	cmd.Dir, cmd.Stdin = target, bytes.NewReader(archive(t, sample()))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, f := range sample() {
		if !f.IsRegular() {
			continue
		}
		got, err := os.ReadFile(filepath.Join(target, f.Name))
		if err != nil || string(got) != string(f.Data) {
			t.Errorf("%s: %q, %v", f.Name, got, err)
		}
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, os.ErrClosed }

func TestAnErrorOfTheWriterIsReported(t *testing.T) {
	if err := cpio.Write(broken{}, sample()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(archive(f, sample()))
	f.Add(archive(f, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := cpio.Read(b)
		if err != nil {
			return
		}
		if string(archive(t, files)) != string(b) {
			t.Error("other bytes for what was read")
		}
	})
}
