package enclavetest_test

import (
	"testing"

	"github.com/keyhold/keyhold/internal/sealed"
)

func mustPublic(t *testing.T, entry []byte) sealed.Public {
	t.Helper()
	e, err := sealed.DecodeEntry(entry)
	if err != nil {
		t.Fatal(err)
	}
	return e.Public
}
