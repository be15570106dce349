package doctor

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"syscall"
)

// maxFile bounds what is read of a settings file, in bytes.
const maxFile = 1 << 20

// read returns a file of the host by its absolute path.
func (e *exam) read(name string) ([]byte, error) {
	f, err := e.Files.Open(inside(name))
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("read %s: longer than 1 MiB", name)
	}
	return b, nil
}

// number reads a file that holds one number.
func (e *exam) number(name string) (int, error) {
	b, err := e.read(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s holds no number", name)
	}
	return n, nil
}

// inside is an absolute path as fs.FS wants it.
func inside(name string) string {
	if name = strings.TrimPrefix(path.Clean(name), "/"); name == "" {
		return "."
	}
	return name
}

// members returns the id of a group and the users that are named in it. Users
// whose first group it is are not.
func (e *exam) members(group string) (id int, users []string, err error) {
	fields, err := e.entry("/etc/group", group, 4)
	if err != nil {
		return 0, nil, err
	}
	if id, err = strconv.Atoi(fields[2]); err != nil {
		return 0, nil, fmt.Errorf("group %s has no number", group)
	}
	return id, strings.FieldsFunc(fields[3], func(r rune) bool { return r == ',' }), nil
}

// entry finds a line of /etc/passwd or /etc/group by its first field.
func (e *exam) entry(file, name string, fields int) ([]string, error) {
	b, err := e.read(file)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) >= fields && f[0] == name {
			return f, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", file, fs.ErrNotExist)
}

// groupOf returns the group that owns a file.
func groupOf(info fs.FileInfo) (int, bool) {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(s.Gid), true
}

// pool is a reservation of allocator.yaml.
type pool struct {
	memoryMiB int
	cpus      int
}

var errAllocator = errors.New("not what the allocator reads: lines of memory_mib, and cpu_count or cpu_pool")

// parseAllocator reads allocator.yaml: one reservation, or a list of them. Other
// YAML than that is refused, as older allocators do.
func parseAllocator(text string) ([]pool, error) {
	var pools []pool
	var p *pool
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" || line == "---" {
			continue
		}
		rest, item := strings.CutPrefix(line, "- ")
		if item || p == nil {
			pools = append(pools, pool{})
			p = &pools[len(pools)-1]
		}
		key, value, ok := strings.Cut(rest, ":")
		if !ok {
			return nil, errAllocator
		}
		if err := p.set(strings.TrimSpace(key), strings.Trim(strings.TrimSpace(value), `"'`)); err != nil {
			return nil, err
		}
	}
	for _, p := range pools {
		if p.memoryMiB == 0 || p.cpus == 0 {
			return nil, errAllocator
		}
	}
	if pools == nil {
		return nil, errAllocator
	}
	return pools, nil
}

func (p *pool) set(key, value string) (err error) {
	switch key {
	case "memory_mib":
		p.memoryMiB, err = strconv.Atoi(value)
	case "cpu_count":
		p.cpus, err = strconv.Atoi(value)
	case "cpu_pool":
		p.cpus, err = countCPUs(value)
	default:
		return errAllocator
	}
	if err != nil || p.memoryMiB < 0 || p.cpus < 0 {
		return errAllocator
	}
	return nil
}

// maxCPUs bounds a list, so that no range of it runs away.
const maxCPUs = 4096

// countCPUs counts those of a list as the kernel prints it: 1,3,5-7.
func countCPUs(list string) (int, error) {
	list = strings.TrimSpace(list)
	if list == "" {
		return 0, nil
	}
	total := 0
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, bad := strconv.Atoi(strings.TrimSpace(from))
		b, bad2 := strconv.Atoi(strings.TrimSpace(to))
		if bad != nil || bad2 != nil || a < 0 || b < a || b > maxCPUs {
			return 0, errors.New("no list of CPUs")
		}
		total += b - a + 1
	}
	return total, nil
}
