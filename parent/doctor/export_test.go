package doctor

import "fmt"

// TestingOnlyParseAllocator reads allocator.yaml and returns each reservation in
// the form in which it can be read again.
func TestingOnlyParseAllocator(text string) ([]string, error) {
	pools, err := parseAllocator(text)
	if err != nil {
		return nil, err
	}
	var list []string
	for _, p := range pools {
		list = append(list, fmt.Sprintf("- memory_mib: %d\n  cpu_count: %d\n", p.memoryMiB, p.cpus))
	}
	return list, nil
}
