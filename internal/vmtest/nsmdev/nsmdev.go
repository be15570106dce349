// Package nsmdev is a virtio-nsm device: it answers what the kernel's NSM driver
// asks with a software NSM. It refuses requests that are not of the NSM's form.
package nsmdev

import (
	"errors"
	"fmt"

	"github.com/keyhold/keyhold/internal/vmtest/vhostuser"
)

// queues of the device: each request is a chain to read, then one to write.
const queues = 1

// errChains ends a device whose driver does not hand over request and room for
// the answer in turn.
var errChains = errors.New("NSM device: the driver's chains are not a request and room for its answer")

// Device is a virtio-nsm device in front of a module.
type Device struct {
	module  Module
	backend *vhostuser.Backend
	request *vhostuser.Chain // whose answer's chain has not come yet
}

// New returns a device that asks m. It serves one boot, as m does.
func New(m Module) *Device {
	d := &Device{module: m}
	d.backend = vhostuser.New(d, queues, nil)
	return d
}

// Backend serves the device to QEMU.
func (d *Device) Backend() *vhostuser.Backend { return d.backend }

// Reset implements vhostuser.Device.
func (d *Device) Reset() { d.request = nil }

// Kick implements vhostuser.Device. Both chains of a request go back before the
// one interrupt: at the first one the kernel's driver wants them both.
func (d *Device) Kick(int) {
	q := d.backend.Queue(0)
	for c, ok := q.Pop(); ok; c, ok = q.Pop() {
		if d.request == nil {
			if c.Room() > 0 || !c.Readable() {
				d.backend.Fail(fmt.Errorf("%w: a request comes first", errChains))
				return
			}
			d.request = c
			continue
		}
		if c.Readable() || c.Room() == 0 {
			d.backend.Fail(fmt.Errorf("%w: room for an answer comes second", errChains))
			return
		}
		answer := Answer(d.module, d.request.Copy())
		if len(answer) > c.Room() {
			answer = refusal(tooSmall)
		}
		q.Put(d.request, 0)
		q.Put(c, c.Fill(answer))
		q.Notify()
		d.request = nil
	}
}
