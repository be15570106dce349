package audit

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/sealed"
	"github.com/keyhold/keyhold/parent/export"
	"github.com/keyhold/keyhold/parent/store"
)

// kindOfKey is what a creation receipt says of the keys that it counts.
type kindOfKey struct {
	fingerprint sealed.Fingerprint
	algorithm   record.Algorithm
	policy      [32]byte // config.Policy.Hash
}

// storedKind is the same of a sealed key, which names its policy.
type storedKind struct {
	fingerprint sealed.Fingerprint
	algorithm   record.Algorithm
	policy      string
}

// walkKeys checks the public part of every sealed key of the boots' keyrings and
// counts them.
func (a *auditor) walkKeys(ctx context.Context) (map[storedKind]int, error) {
	rings := map[string]map[sealed.Fingerprint]bool{}
	for _, b := range a.boots {
		if b.public == nil {
			continue
		}
		id := sealed.KeyringID(b.statement.Keyring, b.statement.Epoch)
		if rings[id] == nil {
			rings[id] = map[sealed.Fingerprint]bool{}
		}
		rings[id][b.statement.Fingerprint] = true
	}
	n := map[storedKind]int{}
	for _, id := range slices.Sorted(maps.Keys(rings)) {
		err := a.s.Keys(ctx, id, func(page []store.Key) error {
			for i := range page {
				a.r.Keys++
				p, err := export.PublicOf(&page[i])
				switch {
				case err != nil:
					a.problem("key %s: it is malformed or another's", page[i].ID)
				case !rings[id][p.Fingerprint]:
					a.problem("key %s: it is of another keyring than its boots", p.KeyID)
				default:
					n[storedKind{p.Fingerprint, p.Algorithm, p.Policy}]++
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the keys of %s: %w", id, err)
		}
	}
	return n, nil
}

// covered checks that receipts tell of as many keys as are stored: of each
// algorithm, and where there are configs also of each policy. More is no
// problem, since keys whose answer was lost are stored nowhere. Which key came
// with which receipt is not recorded, so one key put in another's place is found
// only by what it signs.
func (a *auditor) covered(stored map[storedKind]int) {
	if len(a.configs) == 0 {
		stored, a.made = anyPolicy(stored, a.made)
	}
	for _, k := range slices.SortedFunc(maps.Keys(stored), compareKinds) {
		made := 0
		for hash := range a.hashesOf(k.policy) {
			made += a.made[kindOfKey{k.fingerprint, k.algorithm, hash}]
		}
		if n := stored[k]; n > made {
			a.problem("keyring of fingerprint %x: it holds %d %s keys of one policy, but receipts tell of %d", k.fingerprint, n, k.algorithm, made)
		}
	}
}

// hashesOf a policy's name: several where a config in between changed it.
func (a *auditor) hashesOf(policy string) map[[32]byte]bool {
	hashes := map[[32]byte]bool{}
	if len(a.configs) == 0 {
		hashes[[32]byte{}] = true
	}
	for _, c := range a.configs {
		if p, ok := c.Policy(policy); ok {
			hashes[p.Hash()] = true
		}
	}
	return hashes
}

// anyPolicy adds up what differs in the policy only.
func anyPolicy(stored map[storedKind]int, made map[kindOfKey]int) (map[storedKind]int, map[kindOfKey]int) {
	s, m := map[storedKind]int{}, map[kindOfKey]int{}
	for k, n := range stored {
		s[storedKind{k.fingerprint, k.algorithm, ""}] += n
	}
	for k, n := range made {
		m[kindOfKey{k.fingerprint, k.algorithm, [32]byte{}}] += n
	}
	return s, m
}

func compareKinds(x, y storedKind) int {
	return slices.Compare(
		[]string{string(x.fingerprint[:]), string(x.algorithm), x.policy},
		[]string{string(y.fingerprint[:]), string(y.algorithm), y.policy})
}
