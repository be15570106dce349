package target

import (
	"fmt"
	"slices"
	"strings"
)

// Arch is an architecture in Go's spelling, which is also that of dist/.
type Arch string

// The architectures that have both enclaves and images of Keyhold.
const (
	AMD64 Arch = "amd64"
	ARM64 Arch = "arm64"
)

// Instance is a type of instance that can be the parent of an enclave, with the
// share that the enclave gets.
//
// Source of the rule: Nitro Enclaves user guide, "Requirements": Intel and AMD
// need at least 4 vCPUs, since an enclave takes whole cores and the parent keeps
// one; Graviton needs 2. The sizes stand here because a list that is wrong shows
// at synth, and a rule that is wrong shows as instances that fail to launch.
type Instance struct {
	Name        string
	Arch        Arch
	CPUs        int
	MiB         int
	EnclaveCPUs int
	EnclaveMiB  int
}

// instances is the allow-list. The first of an architecture is its default.
var instances = []Instance{
	{Name: "c6a.xlarge", Arch: AMD64, CPUs: 4, MiB: 8192, EnclaveCPUs: 2, EnclaveMiB: 1024},
	{Name: "c6a.2xlarge", Arch: AMD64, CPUs: 8, MiB: 16384, EnclaveCPUs: 4, EnclaveMiB: 2048},
	{Name: "c6a.4xlarge", Arch: AMD64, CPUs: 16, MiB: 32768, EnclaveCPUs: 8, EnclaveMiB: 4096},
	{Name: "c6g.large", Arch: ARM64, CPUs: 2, MiB: 4096, EnclaveCPUs: 1, EnclaveMiB: 1024},
	{Name: "c6g.xlarge", Arch: ARM64, CPUs: 4, MiB: 8192, EnclaveCPUs: 2, EnclaveMiB: 1024},
	{Name: "c6g.2xlarge", Arch: ARM64, CPUs: 8, MiB: 16384, EnclaveCPUs: 4, EnclaveMiB: 2048},
	{Name: "c7g.large", Arch: ARM64, CPUs: 2, MiB: 4096, EnclaveCPUs: 1, EnclaveMiB: 1024},
	{Name: "c7g.xlarge", Arch: ARM64, CPUs: 4, MiB: 8192, EnclaveCPUs: 2, EnclaveMiB: 1024},
	{Name: "c7g.2xlarge", Arch: ARM64, CPUs: 8, MiB: 16384, EnclaveCPUs: 4, EnclaveMiB: 2048},
}

// Instances returns the allow-list.
func Instances() []Instance { return slices.Clone(instances) }

// instance returns the one of that name, or the default of the architecture.
func instance(name string, arch Arch) (Instance, error) {
	var names []string
	for _, i := range instances {
		if i.Arch != arch {
			continue
		}
		if name == "" || i.Name == name {
			return i, nil
		}
		names = append(names, i.Name)
	}
	return Instance{}, fmt.Errorf("instance %q: not one of the types with enclave support that are allowed for %s: %s", name, arch, strings.Join(names, ", "))
}
