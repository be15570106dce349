package doctor_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/keyhold/keyhold/parent/doctor"
)

func FuzzParseAllocator(f *testing.F) {
	for _, seed := range []string{
		"---\nmemory_mib: 1024\ncpu_count: 2\n", "memory_mib: 2048\ncpu_pool: 2,3,6-9\n", "- memory_mib: 1\n  cpu_count: 2\n- cpu_pool: \"1\"\n  memory_mib: 5\n",
		"", "---", "- ", ":", "cpu_pool: 0-9999999999", "memory_mib: -1\ncpu_count: 2", "# only a comment",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		pools, err := doctor.TestingOnlyParseAllocator(text)
		if err != nil {
			return
		}
		if len(pools) == 0 {
			t.Fatal("nothing is reserved, and that is no error")
		}
		again, err := doctor.TestingOnlyParseAllocator(strings.Join(pools, ""))
		if err != nil || !slices.Equal(pools, again) {
			t.Fatalf("%q came back as %q, %v", pools, again, err)
		}
	})
}
