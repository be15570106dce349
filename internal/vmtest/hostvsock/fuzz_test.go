package hostvsock_test

import (
	"bytes"
	"testing"

	"github.com/keyhold/keyhold/internal/vmtest/fakeguest"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
)

func FuzzPacketsAreWrittenAsTheyWereRead(f *testing.F) {
	f.Add(make([]byte, headerLen))
	f.Add(append(make([]byte, headerLen), 1))
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := hostvsock.TestingOnlyRewrite(p)
		if err == nil && !bytes.Equal(got, p) { //nolint:forbidigo // public
			t.Errorf("read % x, wrote % x", p, got)
		}
	})
}

// FuzzTheDeviceOutlivesItsGuest sends anything at all.
func FuzzTheDeviceOutlivesItsGuest(f *testing.F) {
	f.Add(make([]byte, headerLen))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) == 0 || len(p) > fakeguest.BufferLen {
			t.Skip("nothing that fits a buffer")
		}
		dev := hostvsock.New(guestCID)
		l := listen(t, dev)
		d := boot(t, dev, 8, linuxBuffer)
		d.tx.Pause()
		d.tx.Add(fakeguest.Part{Out: p})
		d.tx.Continue()
		_ = d.guest.End() // it may refuse what came, and must not break
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}
