package checker

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// fingerprint of what the tables say about a record: 128 bits of SHA-256, so that a million fit.
type fingerprint [16]byte

// line is what an export says about a record, as far as it is compared.
type line struct {
	RecordID  string  `json:"record_id"`
	Kind      string  `json:"kind"`
	Payload   string  `json:"payload"`
	KeyID     *string `json:"key_id"`
	PublicKey *string `json:"public_key"`
	Signature *string `json:"signature"`
	BatchID   string  `json:"batch_id"`
	Index     int     `json:"index"`
	State     string  `json:"state"`
	Refusal   *string `json:"refusal"`
}

func (l *line) fingerprint() (f fingerprint) {
	raw, err := json.Marshal(l)
	if err != nil {
		panic(err) // texts and a number
	}
	sum := sha256.Sum256(raw)
	copy(f[:], sum[:])
	return f
}

// checkBatch holds one batch against its segments and its receipt.
func (r *run) checkBatch(c *control, s segments) {
	entries, err := readPayload(s.payload)
	if err != nil || uint64(len(entries)) != c.count {
		r.found("G1: batch %s: its payload is missing, malformed or of another count", c.id)
		return
	}
	root := payloadRoot(c.kind, entries)
	if string(root[:]) != string(c.root) {
		r.found("H3: batch %s: its payload is not the imported one", c.id)
	}
	var outcomes []outcome
	var rec *receipt
	switch {
	case c.state == "SIGNED":
		if outcomes, err = readResult(s.result); err != nil || len(outcomes) != len(entries) {
			r.found("G1: batch %s: it is SIGNED, and its result is missing, malformed or of another count", c.id)
			return
		}
		rec = r.checkReceipt(c, root, outcomes)
	case s.result != nil:
		r.found("G1: batch %s: a result, and the batch is %s", c.id, c.state)
	case c.state != "QUARANTINED":
		r.found("G5: batch %s ended %s", c.id, c.state)
	}
	r.checkRecords(c, entries, outcomes, rec)
}

func payloadRoot(kind string, entries []entry) [32]byte {
	leaves := make([][32]byte, len(entries))
	for i, e := range entries {
		leaves[i] = leaf("keyhold-payload-v1", i, []byte(kind), []byte(e.id), e.payload)
	}
	return merkle(leaves)
}

// checkReceipt returns the receipt of a signed batch, nil where there is none to be had.
func (r *run) checkReceipt(c *control, root [32]byte, outcomes []outcome) *receipt {
	leaves := make([][32]byte, len(outcomes))
	refused := uint64(0)
	for i, o := range outcomes {
		leaves[i] = leaf("keyhold-result-v1", i, []byte(o.refusal), o.signature)
		if o.refusal != "" {
			refused++
		}
	}
	if refused != c.refused {
		r.found("G5: batch %s: %d records are refused, and its item says %d", c.id, refused, c.refused)
	}
	if c.receipt.seq == 0 {
		if refused != c.count {
			r.found("H3: batch %s: signatures without a receipt", c.id)
		}
		return nil
	}
	rec, there := r.receipts[c.receipt]
	if !there {
		r.found("H3: batch %s: its receipt is missing or was found wrong", c.id)
		return nil
	}
	if !rec.isOf(c) || rec.payloadRoot != root || rec.resultRoot != merkle(leaves) {
		r.found("H3: batch %s: its receipt is about something else", c.id)
		return nil
	}
	if rec.timeMS > c.claimed.Add(c.lease).UnixMilli() {
		r.found("G3: batch %s: it was signed after its lease", c.id)
	}
	return rec
}

// checkRecords verifies every signature, and enters each record once.
func (r *run) checkRecords(c *control, entries []entry, outcomes []outcome, rec *receipt) {
	var verify func(message, signature []byte) error
	if rec != nil {
		var err error
		if verify, err = verifier(rec.algorithm, rec.public); err != nil || c.kind != "message" {
			r.found("G1: batch %s: kind %s: %v", c.id, c.kind, err)
			return
		}
	}
	counts := map[string]int{}
	lines := make([]line, len(entries))
	for i, e := range entries {
		l := &lines[i]
		*l = line{RecordID: e.id, Kind: c.kind, Payload: encode64(e.payload), BatchID: c.id, Index: i, State: c.state}
		if e.id == "" {
			l.RecordID = fmt.Sprintf("%s.%d", c.id, i)
		} else if r.refs[e.id] != (ref{c.id, uint64(i)}) {
			r.found("G1: record %s: the records table does not lead to it", e.id)
		}
		if c.key != "" {
			l.KeyID = digits([]byte(c.key))
		}
		if rec != nil {
			l.PublicKey = digits(rec.public)
		}
		if outcomes == nil {
			counts[l.State]++
			continue
		}
		if o := outcomes[i]; o.refusal != "" {
			l.State, l.Refusal = "REFUSED", &o.refusal
		} else {
			l.Signature = digits(o.signature)
			if verify == nil || verify(e.payload, o.signature) != nil {
				r.found("G1: record %s: its signature is not valid", l.RecordID)
			}
		}
		counts[l.State]++
	}
	r.enter(lines, counts)
}

func digits(b []byte) *string {
	s := hex.EncodeToString(b)
	return &s
}

func (r *run) enter(lines []line, counts map[string]int) {
	var twice []string
	r.mu.Lock()
	for i := range lines {
		id := lines[i].RecordID
		if _, again := r.records[id]; again {
			twice = append(twice, id)
		}
		r.records[id] = lines[i].fingerprint()
	}
	r.report.Records += len(lines)
	r.report.Signed += counts["SIGNED"]
	r.report.Refused += counts["REFUSED"]
	r.report.Quarantined += counts["QUARANTINED"]
	r.mu.Unlock()
	for _, id := range twice {
		r.found("G1: record %s stands in two places", id)
	}
}
