package attestation_test

import (
	"crypto/elliptic"
	"testing"

	"github.com/keyhold/keyhold/attestation"
)

// The strict checks refuse these documents before nitrite sees them; here it
// is asked directly.
func TestSecondOpinionRefusesAndSurvivesItsPanic(t *testing.T) {
	f := newForger(t)
	if err := attestation.TestingOnlySecondOpinion(f.document(f.fields()), f.root.cert, f.now); err != nil {
		t.Errorf("a right document: %v", err)
	}
	p521 := f.certifyKey(&f.zone, forgedName, f.newKey(elliptic.P521()), asLeaf)
	other := newForger(t)
	late := f.now.AddDate(0, 0, 1)
	for name, err := range map[string]error{
		"a P-521 leaf, on which nitrite panics": attestation.TestingOnlySecondOpinion(f.from(p521, f.regional, f.zone), f.root.cert, f.now),
		"another root":                          attestation.TestingOnlySecondOpinion(f.document(f.fields()), other.root.cert, f.now),
		"another time":                          attestation.TestingOnlySecondOpinion(f.document(f.fields()), f.root.cert, late),
		"another signature":                     attestation.TestingOnlySecondOpinion(flipped(f.document(f.fields())), f.root.cert, f.now),
		"no document":                           attestation.TestingOnlySecondOpinion(nil, f.root.cert, f.now),
	} {
		check(t, name, err, attestation.ErrSecondOpinion)
	}
}
