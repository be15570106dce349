package eif

import (
	"maps"
	"slices"
)

// TestingOnlyCodes returns all codes.
func TestingOnlyCodes() []Code { return slices.Sorted(maps.Keys(texts)) }
