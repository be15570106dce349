// Package nsmtest is a software NSM for tests and local mode. It really signs
// its documents, under a CA of its own, which no verifier trusts unless told to.
package nsmtest

import (
	"crypto/rand"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyhold/keyhold/attestation/nsm"
)

// renewBefore is how long before the end of its leaf an NSM gets a new one.
const renewBefore = 10 * time.Minute

// Operations, as Faults.Fault gets them.
const (
	OpAttest   = "attest"
	OpExtend   = "extend"
	OpLock     = "lock"
	OpDescribe = "describe"
	OpRandom   = "random"
)

// moduleIDBytes are those that a verifier accepts in a module id.
const moduleIDBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

// Faults are what an NSM does wrong on purpose. The zero value is none.
type Faults struct {
	// Fault is called before each operation, without locks held; its error is
	// returned and the operation not done.
	Fault func(op string) error

	EmptyDocument    bool           // Attest answers no bytes and no error
	Nonce            []byte         // documents carry this nonce instead of the wanted one
	PCRs             map[int][]byte // documents carry these values instead of the registers'
	MangledSignature bool           // documents are signed, then one signature bit is flipped
	WrongKey         bool           // documents are signed by a key that the leaf does not name
}

// Options say which enclave the NSM belongs to.
type Options struct {
	ModuleID string // default: a random one of AWS's form

	// PCRs are the boot measurements: 0, 1, 2, 3, 4 and 8, of 48 bytes each.
	// PCR0 is needed and must not be zero; 1 and 2 have fixed values when not
	// given, the others are zero. See Measurements.
	PCRs map[int][]byte

	Debug  bool             // as started in debug mode: PCR0, 1 and 2 are zero
	Now    func() time.Time // default: the CA's clock
	Faults Faults
}

// Measurements returns values for PCR0, 1 and 2 that differ from image to
// image: the SHA-384 of name and index.
func Measurements(name string) map[int][]byte {
	out := make(map[int][]byte, 3)
	for i := range 3 {
		sum := sha512.Sum384(fmt.Appendf(nil, "keyhold-nsmtest-pcr%d %s", i, name))
		out[i] = sum[:]
	}
	return out
}

type register struct {
	value  [nsm.PCRSize]byte
	locked bool
}

// NSM is the device of one enclave boot. It implements nsm.Session; registers
// 0 to 15 are locked from the start.
type NSM struct {
	ca       *CA
	moduleID string
	now      func() time.Time

	mu        sync.Mutex
	faults    Faults
	closed    bool
	registers [nsm.PCRCount]register
	chain     chain
}

var _ nsm.Session = (*NSM)(nil)

// New returns the NSM of a freshly booted enclave.
func New(ca *CA, opt Options) (*NSM, error) {
	n := &NSM{ca: ca, moduleID: opt.ModuleID, now: opt.Now, faults: opt.Faults}
	if n.now == nil {
		n.now = ca.now
	}
	if n.moduleID == "" {
		n.moduleID = randomModuleID()
	}
	foreign := func(r rune) bool { return !strings.ContainsRune(moduleIDBytes, r) }
	if len(n.moduleID) > 128 || strings.ContainsFunc(n.moduleID, foreign) {
		return nil, errors.New("software NSM: module id is not of 1 to 128 letters, digits, '-' or '_'")
	}
	if err := n.measure(opt); err != nil {
		return nil, fmt.Errorf("software NSM: %w", err)
	}
	return n, nil
}

// measure sets the boot registers and locks them.
func (n *NSM) measure(opt Options) error {
	for i, value := range opt.PCRs {
		if !slices.Contains([]int{0, 1, 2, 3, 4, 8}, i) {
			return fmt.Errorf("PCR%d is none that a boot measures", i)
		}
		if len(value) != nsm.PCRSize {
			return fmt.Errorf("PCR%d has %d bytes, want %d", i, len(value), nsm.PCRSize)
		}
		n.registers[i].value = [nsm.PCRSize]byte(value)
	}
	zero := [nsm.PCRSize]byte{}
	fixed := Measurements("")
	for i := range 3 {
		switch r := &n.registers[i]; {
		case opt.Debug:
			r.value = zero
		case r.value != zero:
		case i == 0:
			return errors.New("PCR0 is missing or zero, and Debug is not set")
		default:
			r.value = [nsm.PCRSize]byte(fixed[i])
		}
	}
	for i := range nsm.BootPCRs {
		n.registers[i].locked = true
	}
	return nil
}

// ModuleID returns the module id that documents carry.
func (n *NSM) ModuleID() string { return n.moduleID }

// SetFaults replaces the faults.
func (n *NSM) SetFaults(f Faults) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.faults = f
}

// Attest implements nsm.Session.
func (n *NSM) Attest(req nsm.AttestRequest) ([]byte, error) {
	faults, err := n.begin(OpAttest)
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if err := req.Check(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if faults.EmptyDocument {
		return nil, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	at := n.now()
	if err := n.renew(at); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	pcrs := make(map[int][]byte, nsm.PCRCount)
	for i := range n.registers {
		if r := n.registers[i]; r.locked { // a document shows locked registers only
			pcrs[i] = r.value[:]
		}
	}
	doc, err := sign(n.chain, body{
		moduleID: n.moduleID, at: at, pcrs: pcrs,
		publicKey: req.PublicKey, userData: req.UserData, nonce: req.Nonce,
	}, faults)
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	return doc, nil
}

// renew gets a new chain when there is none or it is near its end, or when the
// clock was set back before its beginning.
func (n *NSM) renew(at time.Time) error {
	if leaf := n.chain.leaf.cert; leaf != nil && !at.Before(leaf.NotBefore) && at.Before(leaf.NotAfter.Add(-renewBefore)) {
		return nil
	}
	c, err := n.ca.issue(n.moduleID, at)
	if err != nil {
		return fmt.Errorf("renew certificates: %w", err)
	}
	n.chain = c
	return nil
}

// ExtendPCR implements nsm.Session.
func (n *NSM) ExtendPCR(index uint16, data []byte) ([]byte, error) {
	if _, err := n.begin(OpExtend); err != nil {
		return nil, fmt.Errorf("extend PCR: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case index >= nsm.PCRCount:
		return nil, fmt.Errorf("extend PCR: %w", nsm.ErrInvalidIndex)
	case n.registers[index].locked:
		return nil, fmt.Errorf("extend PCR: %w", nsm.ErrReadOnlyIndex)
	case len(data) == 0:
		return nil, fmt.Errorf("extend PCR: %w", nsm.ErrInvalidArgument)
	case len(data) > nsm.MaxExtendData:
		return nil, fmt.Errorf("extend PCR: %w", nsm.ErrInputTooLarge)
	}
	r := &n.registers[index]
	r.value = sha512.Sum384(append(r.value[:], data...))
	return slices.Clone(r.value[:]), nil
}

// LockPCRs implements nsm.Session.
func (n *NSM) LockPCRs(below uint16) error {
	if _, err := n.begin(OpLock); err != nil {
		return fmt.Errorf("lock PCRs: %w", err)
	}
	if below > nsm.PCRCount {
		return fmt.Errorf("lock PCRs: %w", nsm.ErrInvalidIndex)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range below {
		n.registers[i].locked = true
	}
	return nil
}

// LockPCR locks one register, which the device can and nsm.Session does not.
func (n *NSM) LockPCR(index uint16) error {
	if _, err := n.begin(OpLock); err != nil {
		return fmt.Errorf("lock PCR: %w", err)
	}
	if index >= nsm.PCRCount {
		return fmt.Errorf("lock PCR: %w", nsm.ErrInvalidIndex)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.registers[index].locked = true
	return nil
}

// DescribePCR implements nsm.Session.
func (n *NSM) DescribePCR(index uint16) ([]byte, bool, error) {
	if _, err := n.begin(OpDescribe); err != nil {
		return nil, false, fmt.Errorf("describe PCR: %w", err)
	}
	if index >= nsm.PCRCount {
		return nil, false, fmt.Errorf("describe PCR: %w", nsm.ErrInvalidIndex)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.registers[index]
	return slices.Clone(r.value[:]), r.locked, nil
}

// Random implements nsm.Session with the operating system's generator.
func (n *NSM) Random(p []byte) error {
	if _, err := n.begin(OpRandom); err != nil {
		return fmt.Errorf("get random: %w", err)
	}
	if _, err := rand.Read(p); err != nil {
		return fmt.Errorf("get random: %w", err)
	}
	return nil
}

// Close implements nsm.Session.
func (n *NSM) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return nil
}

// begin refuses a closed session and runs the injected fault.
func (n *NSM) begin(op string) (Faults, error) {
	n.mu.Lock()
	faults, closed := n.faults, n.closed
	n.mu.Unlock()
	if closed {
		return Faults{}, nsm.ErrClosed
	}
	if faults.Fault != nil {
		if err := faults.Fault(op); err != nil {
			return Faults{}, err
		}
	}
	return faults, nil
}

// randomModuleID has AWS's form: i-<17 hex digits>-enc<16 hex digits>.
func randomModuleID() string {
	var b [17]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24: it ends the process instead
	digits := hex.EncodeToString(b[:])
	return "i-" + digits[:17] + "-enc" + digits[17:33]
}
