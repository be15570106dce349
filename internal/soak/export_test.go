package main

// TestingOnlyJudge judges samples, given by a function of sample and quantity.
func TestingOnlyJudge(n, failed int, at func(sample, quantity int) float64) (string, error) {
	m := &meter{failed: failed}
	for i := range n {
		line := make([]float64, len(quantities))
		for q := range line {
			line[q] = at(i, q)
		}
		m.samples = append(m.samples, line)
	}
	return m.judge()
}

// TestingOnlyQuantities are the names of what is measured.
func TestingOnlyQuantities() (names []string) {
	for _, q := range quantities {
		names = append(names, q.name)
	}
	return names
}
