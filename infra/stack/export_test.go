package stack

import "github.com/keyhold/keyhold/infra/calls"

// TestingOnlyAccess is what roles may do with tables, as their policies are made.
func TestingOnlyAccess(role string) []calls.Request {
	var out []calls.Request
	for _, a := range map[string][]access{
		"parent": parentAccess(), "creator": creatorAccess(), "ingest": ingestAccess(), "control": controlAccess(),
		"operator": operatorAccess(),
	}[role] {
		for _, action := range a.actions {
			out = append(out, calls.Request{Table: a.table, Action: action})
		}
		for _, action := range a.index {
			out = append(out, calls.Request{Table: a.table, Index: indexOf(a.table), Action: action})
		}
	}
	return out
}

// TestingOnlyScripts are the shell scripts that hosts run, by name.
func TestingOnlyScripts() map[string]string {
	out := map[string]string{"userdata.sh": "#!/bin/bash\nset -euo pipefail\n" + userData}
	for _, d := range documents() {
		raw, err := scripts.ReadFile("documents/" + d.file)
		if err != nil {
			panic(err)
		}
		out[d.file] = string(raw)
	}
	return out
}
