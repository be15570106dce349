// Package cpio writes and reads newc archives, in which Linux takes its first
// file system. It writes the same bytes for the same files, and refuses to read
// anything that it would not write.
package cpio

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strconv"
)

// Types of files, as in st_mode.
const (
	Regular   uint32 = 0o100000
	Directory uint32 = 0o040000
	CharDev   uint32 = 0o020000

	typeMask uint32 = 0o170000
	permMask uint32 = 0o000777 // no setuid, no setgid, no sticky bit
)

const (
	magic     = "070701" // newc, without checksums
	fields    = 13
	headerLen = len(magic) + 8*fields
	trailer   = "TRAILER!!!"
	block     = 512 // an archive ends on a multiple of this many bytes, as that of the cpio program does
	align     = 4   // of names and data
	maxName   = 4096
	maxMinor  = 1 << 20 // device numbers of Linux: 12 bits and 20 bits
	maxMajor  = 1 << 12
)

// Reasons to refuse.
var (
	ErrName      = errors.New("cpio: a name is not a clean relative path of printable ASCII")
	ErrTwice     = errors.New("cpio: two files have one name")
	ErrParent    = errors.New("cpio: a file lies in a folder that is not in the archive")
	ErrMode      = errors.New("cpio: only regular files, folders and character devices, with plain permissions")
	ErrLong      = errors.New("cpio: a file has 4 GiB or more")
	ErrMalformed = errors.New("cpio: not an archive that this program writes")
)

// File is a file, folder or character device, owned by root, with no time.
type File struct {
	Name  string // relative, with slashes
	Mode  uint32 // st_mode: type and permissions
	Major uint32 // of a device
	Minor uint32
	Data  []byte // of a regular file
}

// IsRegular tells whether f is a regular file.
func (f *File) IsRegular() bool { return f.Mode&typeMask == Regular }

// Write writes an archive of files, sorted by name. Every folder must be among
// them. The same files give the same bytes: times, owners and inode numbers say
// nothing about the machine.
func Write(w io.Writer, files []File) error {
	sorted := slices.SortedFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	if err := check(sorted); err != nil {
		return err
	}
	out := writer{w: w}
	for i := range sorted {
		out.file(uint64(i)+1, &sorted[i])
	}
	out.file(0, &File{Name: trailer})
	out.pad(block)
	if out.err != nil {
		return fmt.Errorf("write archive: %w", out.err)
	}
	return nil
}

// check reads the files in the order of their names, in which a folder stands
// before what it holds.
func check(sorted []File) error {
	folders := map[string]bool{".": true}
	for i := range sorted {
		f := &sorted[i]
		if !clean(f.Name) {
			return ErrName
		}
		if i > 0 && sorted[i-1].Name == f.Name {
			return ErrTwice
		}
		if !folders[path.Dir(f.Name)] {
			return ErrParent
		}
		if err := checkMode(f); err != nil {
			return err
		}
		folders[f.Name] = f.Mode&typeMask == Directory
	}
	return nil
}

func clean(name string) bool {
	for _, c := range []byte(name) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return len(name) < maxName && name != "" && name != trailer && name != "." && name != ".." &&
		path.Clean(name) == name && name[0] != '/' && (len(name) < 3 || name[:3] != "../")
}

func checkMode(f *File) error {
	if uint64(len(f.Data)) > math.MaxUint32 {
		return ErrLong
	}
	device := f.Mode&typeMask == CharDev
	if f.Mode&^(typeMask|permMask) != 0 || !device && (f.Major != 0 || f.Minor != 0) || f.Major >= maxMajor || f.Minor >= maxMinor {
		return ErrMode
	}
	switch f.Mode & typeMask {
	case Regular:
		return nil
	case Directory, CharDev:
		if len(f.Data) == 0 {
			return nil
		}
	}
	return ErrMode
}

// writer keeps the first error, and counts for the alignment.
type writer struct {
	w   io.Writer
	n   int64
	err error
}

func (w *writer) write(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.n, w.err = w.n+int64(n), err
}

func (w *writer) pad(to int64) {
	var zeros [block]byte
	w.write(zeros[:(to-w.n%to)%to])
}

func (w *writer) file(inode uint64, f *File) {
	links := 1
	if f.Mode&typeMask == Directory {
		links = 2
	}
	// inode, mode, uid, gid, links, mtime, size, device of the file (2), device (2), length of the name, checksum
	w.write(fmt.Appendf(nil, "%s%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", magic,
		inode, f.Mode, 0, 0, links, 0, len(f.Data), 0, 0, f.Major, f.Minor, len(f.Name)+1, 0))
	w.write(append([]byte(f.Name), 0))
	w.pad(align)
	w.write(f.Data)
	w.pad(align)
}

// Read returns the files of an archive that Write wrote. Their data are parts of
// archive.
func Read(archive []byte) ([]File, error) {
	var files []File
	rest := archive
	for {
		f, after, err := next(rest, uint64(len(archive))-uint64(len(rest)))
		if err != nil {
			return nil, err
		}
		if f.Name == trailer {
			break
		}
		files, rest = append(files, f), after
	}
	// What stands in fields that were not looked at, in padding and behind the end
	// is caught here, and so is every rule of Write.
	var again bytes.Buffer
	again.Grow(len(archive))
	if err := Write(&again, files); err != nil {
		return nil, err
	}
	if !bytes.Equal(again.Bytes(), archive) { //nolint:forbidigo // nothing here is secret
		return nil, ErrMalformed
	}
	return files, nil
}

// next reads one entry; offset is where it begins, for the alignment.
func next(b []byte, offset uint64) (File, []byte, error) {
	if len(b) < headerLen || string(b[:len(magic)]) != magic {
		return File{}, nil, ErrMalformed
	}
	var v [fields]uint32
	for i := range v {
		at := len(magic) + 8*i
		n, err := strconv.ParseUint(string(b[at:at+8]), 16, 32)
		if err != nil {
			return File{}, nil, ErrMalformed
		}
		v[i] = uint32(n)
	}
	f := File{Mode: v[1], Major: v[9], Minor: v[10]}
	nameLen, size := uint64(v[11]), uint64(v[6])
	nameEnd := uint64(headerLen) + nameLen
	dataAt := nameEnd + (align-(offset+nameEnd)%align)%align
	dataEnd := dataAt + size
	end := dataEnd + (align-(offset+dataEnd)%align)%align
	if nameLen < 2 || end > uint64(len(b)) {
		return File{}, nil, ErrMalformed
	}
	f.Name = string(b[headerLen : nameEnd-1])
	if size > 0 {
		f.Data = b[dataAt:dataEnd:dataEnd]
	}
	return f, b[end:], nil
}
