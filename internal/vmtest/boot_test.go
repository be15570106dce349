package vmtest_test

import (
	"testing"
	"time"

	"github.com/keyhold/keyhold/internal/eif/cpio"
)

func TestFirst(t *testing.T) {
	needVM(t)
	s := newSite(t)
	b := build(t, testProgram, cpio.File{Name: "kms-root.pem", Mode: cpio.Regular | 0o644, Data: s.kms.CACertificate()})
	t.Logf("%.1f MB", b.size(t))
	began := time.Now()
	vm := s.boot(b, machine{})
	s.awaitHeartbeat(vm)
	t.Logf("heartbeat %s", time.Since(began))
	c := s.connect()
	t.Logf("connected %s %+v", time.Since(began), c.Hello())
	t.Log(vm.Console())
}
