package checker

import (
	"context"
	"errors"
	"time"
)

// read takes in all tables but the contents of segments.
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
		{"segments", []string{"b", "q"}, func(i *row) error {
			id := i.text("b")
			if r.parts[id] == nil {
				r.parts[id] = map[string]bool{}
			}
			r.parts[id][i.text("q")] = true
			return nil
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
