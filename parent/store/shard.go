package store

import (
	"hash/fnv"

	"github.com/keyhold/keyhold/internal/record"
)

// ReadyShard is the shard of the ready index that a batch lives in: a hash, so
// that the batches of one import spread over all.
func ReadyShard(id record.BatchID) int {
	h := fnv.New32a()
	h.Write([]byte(id))
	return int(h.Sum32() % ReadyShards)
}

// IdleShard is the shard of its pool that a key lives in. Key ids are hashes.
func IdleShard(id record.KeyID) int { return int(id[0] % IdleShards) }
