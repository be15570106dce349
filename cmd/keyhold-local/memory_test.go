package main_test

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// needles are byte strings that are looked for, by name.
type needles struct {
	list    []needle
	starts  [1 << 16][]int // by the first two bytes
	longest int
}

type needle struct {
	name string
	text []byte
}

func (n *needles) add(name string, text []byte) {
	if len(text) < 16 {
		panic("a needle this short is found by chance")
	}
	first := prefix(text)
	n.starts[first] = append(n.starts[first], len(n.list))
	n.list = append(n.list, needle{name, text})
	n.longest = max(n.longest, len(text))
}

// base64 adds what text looks like inside of something longer that was encoded: it may begin at any of
// the three places of a group, in both alphabets.
func (n *needles) base64(name string, text []byte) {
	for skip := range 3 {
		whole := text[skip : skip+(len(text)-skip)/3*3]
		n.add(name, []byte(base64.StdEncoding.EncodeToString(whole)))
		n.add(name, []byte(base64.URLEncoding.EncodeToString(whole)))
	}
}

func prefix(b []byte) int { return int(b[0])<<8 | int(b[1]) }

// in counts each needle in what r reads.
func (n *needles) in(r io.Reader, found map[string]int) error {
	const step = 1 << 20
	buf := make([]byte, 0, step+n.longest)
	for {
		k, err := io.ReadFull(r, buf[len(buf):len(buf)+step])
		buf = buf[:len(buf)+k]
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return err
		}
		// A needle that begins in the last bytes is found with the next ones.
		end := len(buf) - n.longest
		if last {
			end = len(buf) - 1
		}
		for i := 0; i < end; i++ {
			for _, at := range n.starts[prefix(buf[i:])] {
				if x := n.list[at]; len(buf)-i >= len(x.text) && string(buf[i:i+len(x.text)]) == string(x.text) {
					found[x.name]++
				}
			}
		}
		if last {
			return nil
		}
		buf = buf[:copy(buf, buf[max(end, 0):])]
	}
}

// inMemory counts each needle in all that a process may write to.
func (n *needles) inMemory(pid int) (found map[string]int, size int64, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, 0, err
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, 0, err
	}
	defer mem.Close()
	found = map[string]int{}
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			return nil, 0, err
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		length := int64(to - from)
		if err := n.in(io.NewSectionReader(mem, int64(from), length), found); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", lines.Text(), err)
		}
		size += length
	}
	return found, size, nil
}

func TestTheSearchFindsWhatIsThere(t *testing.T) {
	t.Parallel()
	var n needles
	n.add("a", []byte("sixteen bytes ..and some more"))
	n.add("b", []byte("sixteen bytes .."))
	for _, at := range []int{0, 1, 1<<20 - 20, 1<<20 - 1, 1 << 20, 1<<20 + 1, 3<<20 - 29} {
		text := make([]byte, 3<<20)
		copy(text[at:], "sixteen bytes ..and some more")
		found := map[string]int{}
		if err := n.in(strings.NewReader(string(text)), found); err != nil {
			t.Fatal(err)
		}
		if found["a"] != 1 || found["b"] != 1 {
			t.Errorf("at %d: found %v, want each once", at, found)
		}
	}
	var coded needles
	coded.base64("c", []byte("sixteen bytes ..and some more"))
	for before := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte("??"[:before] + "sixteen bytes ..and some more??"))
		found := map[string]int{}
		if err := coded.in(strings.NewReader(text), found); err != nil {
			t.Fatal(err)
		}
		if found["c"] == 0 {
			t.Errorf("behind %d bytes: not found in base64", before)
		}
	}
}
