package checker

import (
	"context"
	"errors"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
)

// read takes in all tables but the segments.
func (r *run) read(ctx context.Context) error {
	for _, t := range []struct {
		table string
		names []string // of the attributes that are wanted; none: all
		f     func(*row) error
	}{
		{"imports", nil, r.addImport},
		{"batches", nil, r.addBatch},
		{"leases", nil, func(i *row) error {
			r.leases[string(i.bytes("k"))] = lease{fence: i.number("f"), used: i.number("u"), owner: i.text("o")}
			return nil
		}},
		{"sealed_keys", []string{"k"}, func(i *row) error { r.keys[string(i.bytes("k"))] = true; return nil }},
		{"boots", nil, func(i *row) error {
			b := &boot{id: string(i.bytes("bt")), document: i.bytes("d"), statement: i.bytes("st")}
			if len(b.id) != 32 {
				return errors.New("a boot id has another length")
			}
			r.boots[b.id] = b
			return nil
		}},
		{"receipts", nil, func(i *row) error {
			at, err := parseLane(i.bytes("l"), i.number("n"))
			r.signed[at] = i.bytes("d")
			return err
		}},
		{"records", []string{"id", "b", "n"}, func(i *row) error {
			r.refs[i.text("id")] = ref{batch: i.text("b"), index: i.number("n")}
			return nil
		}},
	} {
		if err := r.db.scan(ctx, t.table, t.names, t.f); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) addImport(i *row) error {
	id, state := i.text("i"), i.text("s")
	if state != "DONE" {
		r.found("G5: import %s is %s", id, state)
	}
	r.imports[id] = [2]uint64{i.number("n"), i.number("rn") - i.number("du")}
	return nil
}

func (r *run) addBatch(i *row) error {
	c := &control{
		id: i.text("b"), imported: i.text("i"), state: i.text("s"), pool: i.text("p"), kind: i.text("kd"),
		key: string(i.bytes("k")), boot: string(i.bytes("bt")), owner: i.text("o"),
		fence: i.number("f"), keyFence: i.number("kf"), used: i.number("u"), usedBefore: i.number("ub"),
		lease: time.Duration(i.number("l")), //nolint:gosec // nanoseconds, minutes at most
		count: i.number("n"), refused: i.number("r"), root: i.bytes("pr"), attempts: i.attempts("h"),
		claimed: i.time("ca"), committed: i.time("cm"),
		receipt: place{string(i.bytes("rb")), uint32(i.number("rl")), i.number("rq")}, //nolint:gosec // 32 bits by its format
	}
	if c.id == "" {
		return errors.New("a batch has no id")
	}
	r.batches[c.id] = c
	return nil
}

// segments of one batch, as they come out of the table.
type segments struct {
	payload, result []byte
	checked         bool // and dropped: a million records would not fit
}

// checkSegments reads the segments, and checks each batch as soon as both of its own are there; what has
// fewer is checked in the end.
func (r *run) checkSegments(ctx context.Context) error {
	var g errgroup.Group
	g.SetLimit(runtime.NumCPU())
	check := func(c *control, s segments) {
		g.Go(func() error { r.checkBatch(c, s); return nil })
	}
	err := r.db.scan(ctx, "segments", nil, func(i *row) error {
		id, part := i.text("b"), i.text("q")
		s := r.segments[id]
		switch part {
		case "payload":
			s.payload = i.bytes("d")
		case "result":
			s.result = i.bytes("d")
		default:
			r.found("G1: a segment of batch %s that is no payload and no result", id)
		}
		if c, known := r.batches[id]; known && s.payload != nil && s.result != nil {
			check(c, s)
			s = segments{checked: true}
		}
		r.segments[id] = s
		return nil
	})
	for id, c := range r.batches {
		if s := r.segments[id]; err == nil && !s.checked {
			check(c, s)
		}
	}
	return errors.Join(err, g.Wait())
}
