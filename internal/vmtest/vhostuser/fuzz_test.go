package vhostuser_test

import "testing"

// FuzzAnyTableOfDescriptorsIsOutlived fills a queue's tables with anything.
func FuzzAnyTableOfDescriptorsIsOutlived(f *testing.F) {
	f.Add(make([]byte, 16*8), uint16(1))
	f.Fuzz(func(t *testing.T, table []byte, avail uint16) {
		g, _ := attached(t)
		q := g.Start(0, 8)
		q.Pause()
		copy(g.Memory()[:16*8], table) // of queue 0, where its descriptors begin
		q.SetAvail(0, avail)
		q.Continue()
		_ = g.End() // it may refuse what came, and must not break
	})
}
