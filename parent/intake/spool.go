package intake

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/refusal"
)

const (
	inputDomain  = "keyhold-input-v1\x00"
	recordDomain = "keyhold-record-v1\x00"
)

// PayloadHash is what a record's id stands for: the SHA-256 over kind and
// payload.
func PayloadHash(kind record.Kind, payload []byte) [32]byte {
	h := sha256.New()
	h.Write([]byte(recordDomain))
	h.Write([]byte(kind))
	h.Write([]byte{0})
	h.Write(payload)
	return [32]byte(h.Sum(nil))
}

// spool is the validated input on disk: each record once, in order. Its memory
// is 64 bytes per record that has an id.
type spool struct {
	f       *os.File
	w       *bufio.Writer
	h       hash.Hash
	seen    map[[16]byte][16]byte // hash of id -> hash of payload
	Records int                   // of the input, repeated ones too
	Repeats int                   // records whose id and payload stood earlier in the input
	Rejects int                   // lines that went to the rejects file
}

// Reject is one line of the rejects file.
type Reject struct {
	Line  int    `json:"line"`
	Code  string `json:"code"`
	Error string `json:"error"`
	Input string `json:"input"` // the line as it came, cut to 4 KiB
}

// fill reads the whole input. Without rejects the first bad line ends it.
func fill(src io.Reader, dir string, kind record.Kind, rejects io.Writer) (_ *spool, err error) {
	f, err := os.CreateTemp(dir, "keyhold-import-")
	if err != nil {
		return nil, fmt.Errorf("spool the input: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil { // the open file lives on; nothing is left behind by a kill
		return nil, errors.Join(fmt.Errorf("spool the input: %w", err), f.Close())
	}
	s := &spool{f: f, w: bufio.NewWriterSize(f, 1<<20), h: sha256.New(), seen: map[[16]byte][16]byte{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	s.h.Write([]byte(inputDomain))
	lines := bufio.NewReaderSize(src, 1<<20)
	for n := 1; ; n++ {
		line, err := readLine(lines)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, errLongLine) {
			return nil, fmt.Errorf("read the input, line %d: %w", n, err)
		}
		if err := s.take(n, line, err, kind, rejects); err != nil {
			return nil, err
		}
	}
	if err := s.w.Flush(); err != nil {
		return nil, fmt.Errorf("spool the input: %w", err)
	}
	return s, nil
}

// take adds line n, which readErr says was too long, or rejects it. Without a
// place for rejects a bad line is an error.
func (s *spool) take(n int, line []byte, readErr error, kind record.Kind, rejects io.Writer) error {
	code, err := refusal.ImportLine, readErr
	if err == nil {
		if len(bytes.TrimSpace(line)) == 0 {
			return nil
		}
		code, err = s.add(line, kind)
	}
	var bad badLine
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &bad) && !errors.Is(err, errLongLine):
		return err
	case rejects == nil:
		return fmt.Errorf("line %d: %w (%w)", n, err, code)
	}
	s.Rejects++
	return reject(rejects, Reject{Line: n, Code: string(code), Error: err.Error(), Input: string(line[:min(len(line), 4096)])})
}

// badLine wraps what is wrong with a line, apart from what is wrong with the disk.
type badLine struct{ error }

func (b badLine) Unwrap() error { return b.error }

const errConflict = lineError("its id stands earlier in the input with another payload")

func (s *spool) add(line []byte, kind record.Kind) (refusal.Code, error) {
	r, err := ParseLine(line, kind)
	if err != nil {
		return refusal.ImportLine, badLine{err}
	}
	if r.ID != "" {
		id := [16]byte(hashOf([]byte(r.ID)))
		ph := PayloadHash(kind, r.Payload)
		if was, ok := s.seen[id]; ok {
			if was != [16]byte(ph[:16]) {
				return refusal.RecordConflict, badLine{errConflict}
			}
			s.Records++
			s.Repeats++
			return "", nil
		}
		s.seen[id] = [16]byte(ph[:16])
	}
	s.Records++
	return "", s.write(r)
}

func hashOf(b []byte) []byte {
	h := sha256.Sum256(b)
	return h[:16]
}

func (s *spool) write(r record.Record) error {
	var head [2 * binary.MaxVarintLen64]byte
	b := binary.AppendUvarint(head[:0], uint64(len(r.ID)))
	b = binary.AppendUvarint(b, uint64(len(r.Payload)))
	for _, part := range [][]byte{b, []byte(r.ID), r.Payload} {
		s.h.Write(part)
		if _, err := s.w.Write(part); err != nil {
			return fmt.Errorf("spool the input: %w", err)
		}
	}
	return nil
}

// Hash of everything that is to be imported.
func (s *spool) Hash() [32]byte { return [32]byte(s.h.Sum(nil)) }

// rewind returns a reader of the records from the first on.
func (s *spool) rewind() (*spoolReader, error) {
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read the spool: %w", err)
	}
	return &spoolReader{r: bufio.NewReaderSize(s.f, 1<<20)}, nil
}

func (s *spool) Close() error {
	s.seen = nil
	return s.f.Close()
}

type spoolReader struct {
	r    *bufio.Reader
	back []record.Record // read before and put back, in order
}

// next returns io.EOF at the end.
func (s *spoolReader) next() (record.Record, error) {
	if len(s.back) > 0 {
		r := s.back[0]
		s.back = s.back[1:]
		return r, nil
	}
	idLen, err := binary.ReadUvarint(s.r)
	if err != nil {
		return record.Record{}, err
	}
	n, err := binary.ReadUvarint(s.r)
	if err != nil {
		return record.Record{}, fmt.Errorf("read the spool: %w", err)
	}
	b := make([]byte, idLen+n)
	if _, err := io.ReadFull(s.r, b); err != nil {
		return record.Record{}, fmt.Errorf("read the spool: %w", err)
	}
	return record.Record{ID: string(b[:idLen]), Payload: b[idLen:]}, nil
}

func (s *spoolReader) putBack(rs ...record.Record) { s.back = append(rs[:len(rs):len(rs)], s.back...) }

const errLongLine = lineError("the line is too long")

// readLine returns the next line without its end; of one that passes MaxLine the
// beginning and errLongLine.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if room := MaxLine + 1 - len(line); len(part) > room {
			line = append(line, part[:room]...)
		} else {
			line = append(line, part...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(line) > 0, err == nil:
			line = bytes.TrimRight(line, "\r\n")
			if len(line) > MaxLine {
				return line, errLongLine
			}
			return line, nil
		default:
			return nil, err
		}
	}
}

func reject(w io.Writer, r Reject) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the rejects file: %w", err)
	}
	if _, err := w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write the rejects file: %w", err)
	}
	return nil
}
