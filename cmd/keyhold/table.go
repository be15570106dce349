package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/keyhold/keyhold/cmd/internal/cli"
)

// column of a table: its head and its least width, 0 for the last one.
type column struct {
	head  string
	width int
}

// table writes rows as they come, so a million of them need no memory: columns
// of fixed width for people, or JSON Lines.
type table struct {
	w       io.Writer
	json    bool
	columns []column
	begun   bool
}

func newTable(w io.Writer, asJSON bool, columns ...column) *table {
	return &table{w: w, json: asJSON, columns: columns}
}

// row writes v as JSON, or the cells.
func (t *table) row(v any, cells ...any) error {
	if t.json {
		return cli.PrintJSON(t.w, v)
	}
	if !t.begun {
		t.begun = true
		heads := make([]any, 0, len(t.columns))
		for _, c := range t.columns {
			heads = append(heads, c.head)
		}
		if err := t.line(heads); err != nil {
			return err
		}
	}
	return t.line(cells)
}

func (t *table) line(cells []any) error {
	var b strings.Builder
	for i, c := range cells {
		fmt.Fprintf(&b, "%-*v  ", t.columns[i].width, c)
	}
	if _, err := fmt.Fprintln(t.w, strings.TrimRight(b.String(), " ")); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

// dash stands for what does not apply.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
