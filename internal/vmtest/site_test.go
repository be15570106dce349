package vmtest_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhold/keyhold/attestation"
	"github.com/keyhold/keyhold/attestation/nsmtest"
	"github.com/keyhold/keyhold/internal/awslocal/kms"
	"github.com/keyhold/keyhold/internal/config"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/vmtest/hostvsock"
	"github.com/keyhold/keyhold/internal/vmtest/nsmdev"
	"github.com/keyhold/keyhold/internal/vmtest/qemu"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent"
	"github.com/keyhold/keyhold/parent/egress"
	"github.com/keyhold/keyhold/parent/signclient"
	"github.com/keyhold/keyhold/parent/store/memory"
)

const (
	account      = "000000000000"
	region       = "us-east-1"
	parentRole   = "arn:aws:iam::" + account + ":role/keyhold-vm-parent"
	accessKeyID  = "VMKEYHOLDPARENT"
	accessSecret = "a-machine-for-tests-has-no-secrets"

	// emulated is added to the measured command line: a busy host delivers the
	// timer's interrupts so late that the kernel would not believe them.
	emulated = " no_timer_check"

	guestCID      = 16
	heartbeatPort = 9000
	heartbeat     = 0xb7
	memoryMiB     = 512

	policyName = "default"
	poolName   = "main"

	// patience is for anything that one machine does. It is generous: machines are
	// emulated on a shared one.
	patience = 2 * time.Minute
)

// site is the parent instance of one test: what stands around an enclave.
type site struct {
	t       *testing.T
	said    *transcript
	log     *slog.Logger
	ca      *nsmtest.CA
	vsock   *hostvsock.Device
	kms     *kms.Server
	addr    string // of kms
	arn     string
	beats   chan byte
	meddler atomic.Pointer[meddler]
	store   *memory.Store
}

// transcript keeps what is logged, for the case that a test fails.
type transcript struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *transcript) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *transcript) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// newSite starts an emulated KMS, and somebody who answers heartbeats.
func newSite(t *testing.T) *site {
	t.Helper()
	said := &transcript{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the parent instance said:\n%s", said)
		}
	})
	s := &site{
		t: t, said: said, log: slog.New(slog.NewTextHandler(said, nil)), vsock: hostvsock.New(guestCID),
		beats: make(chan byte, 16), store: memory.New(),
	}
	var err error
	if s.ca, err = nsmtest.NewCA(nil); err != nil {
		t.Fatal(err)
	}
	s.kms, err = kms.New(kms.Options{
		Dir: t.TempDir(), Account: account, Region: region, Root: s.ca.Root(), Logger: s.log,
		Credentials: func(id string) (kms.Credential, bool) {
			return kms.Credential{SecretAccessKey: accessSecret, PrincipalARN: parentRole}, id == accessKeyID
		},
		Faults: s.meddle,
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.arn, err = s.kms.CreateKey(nil); err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	s.run("KMS", func(ctx context.Context) error { return s.kms.Serve(ctx, l) })
	s.answerHeartbeats()
	return s
}

// meddle is called before KMS looks at a request.
func (s *site) meddle(operation string) kms.Fault {
	if m := s.meddler.Load(); m != nil && m.operation == operation {
		m.f()
	}
	return kms.Fault{}
}

// meddler is what happens before an operation of KMS.
type meddler struct {
	operation string
	f         func()
}

// beforeKMS calls f before each of these operations from now on.
func (s *site) beforeKMS(operation string, f func()) { s.meddler.Store(&meddler{operation, f}) }

// run runs f until the test ends, and waits for it.
func (s *site) run(what string, f func(context.Context) error) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.t.Context()))
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("%s: %v", what, err)
		}
	})
}

func (s *site) listen(port uint32) net.Listener {
	s.t.Helper()
	l, err := s.vsock.Listen(port)
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

// answerHeartbeats does what nitro-cli does for an enclave that boots.
func (s *site) answerHeartbeats() {
	l := s.listen(heartbeatPort)
	s.run("heartbeats", func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { _ = l.Close() })()
		for {
			c, err := l.Accept()
			if err != nil {
				return nil // the test is over
			}
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err == nil {
				_, _ = c.Write(b[:])
			}
			_ = c.Close()
			s.beats <- b[0]
		}
	})
}

// proveOften lets an enclave look at its key policy every few seconds.
func proveOften(c *config.Config) { c.KeyPolicy.RevalidateEveryS = 5 }

// config permits secp256k1 keys that sign messages.
func (s *site) config(keyring string, change ...func(*config.Config)) []byte {
	s.t.Helper()
	c := &config.Config{
		Version: 1, KMSKeyARN: s.arn, Keyring: keyring, Epochs: []uint32{1}, SealEpoch: 1,
		Policies:  []config.Policy{{Name: policyName, Kinds: []record.Kind{record.Message}}},
		Create:    []config.Create{{Algorithm: record.Secp256k1, Policy: policyName, Max: 1000}},
		Lease:     config.LeaseLimit{MaxMS: config.DefaultLeaseMaxMS, MarginMS: config.DefaultLeaseMarginMS},
		KeyPolicy: config.DefaultKeyPolicy(),
	}
	for _, f := range change {
		f(c)
	}
	raw, err := config.Encode(c)
	if err != nil {
		s.t.Fatal(err)
	}
	return raw
}

// admit gives the key to an image with a config, and to nobody else.
func (s *site) admit(pcr0, raw []byte) {
	s.t.Helper()
	pcr16 := config.PCR16(raw)
	policy, err := kms.DefaultPolicy(account, parentRole, []kms.Pair{{PCR0: pcr0, PCR16: pcr16[:]}})
	if err == nil {
		err = s.kms.PutKeyPolicy(s.arn, policy)
	}
	if err != nil {
		s.t.Error(err) // it may be called from KMS
	}
}

// wanted is what the boot documents of an image with a config must say.
func wanted(pcrs map[int][]byte, raw []byte) attestation.Image {
	pcr16 := config.PCR16(raw)
	return attestation.Image{PCRs: map[int][]byte{0: pcrs[0], 1: pcrs[1], 2: pcrs[2], 16: pcr16[:]}}
}

// machine says how a boot differs from a good one.
type machine struct {
	debug  bool                // the NSM shows what it shows of an enclave in debug mode
	noNSM  bool                // there is no NSM device
	driver func([]byte) []byte // changes the NSM's driver further
}

// boot starts an image. The machine ends with the test.
func (s *site) boot(b built, m machine) *qemu.VM {
	s.t.Helper()
	module, err := nsmtest.New(s.ca, nsmtest.Options{PCRs: b.pcrs, Debug: m.debug})
	if err != nil {
		s.t.Fatal(err)
	}
	if m.driver == nil {
		m.driver = func(b []byte) []byte { return b }
	}
	devices := []qemu.Device{{Name: "vhost-user-vsock-pci", Backend: s.vsock.Backend()}}
	if !m.noNSM {
		// QEMU would acknowledge features to this device that it did not offer.
		const name = "vhost-user-rng-pci,event_idx=off,indirect_desc=off"
		devices = append(devices, qemu.Device{Name: name, Backend: nsmdev.New(module).Backend()})
	}
	vm, err := qemu.Start(qemu.Config{
		Kernel: b.Kernel, Cmdline: b.Cmdline + emulated, Initrd: b.initrd(s.t, m.driver), MemoryMiB: memoryMiB, Devices: devices,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := vm.Kill(); err != nil && !s.t.Failed() {
			s.t.Errorf("the machine ended with: %v", err)
		}
		if s.t.Failed() {
			s.t.Logf("the console:\n%s", vm.Console())
		}
	})
	return vm
}

func (s *site) patience() context.Context {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

// await waits for a line of the console.
func (s *site) await(vm *qemu.VM, parts ...string) string {
	s.t.Helper()
	line, err := vm.Await(s.patience(), parts...)
	if err != nil {
		s.t.Fatal(err)
	}
	return line
}

// awaitHeartbeat waits for the one of a boot.
func (s *site) awaitHeartbeat(vm *qemu.VM) {
	s.t.Helper()
	select {
	case b := <-s.beats:
		if b != heartbeat {
			s.t.Fatalf("the heartbeat is %#x", b)
		}
	case <-s.patience().Done():
		s.t.Fatalf("no heartbeat; the console:\n%s", vm.Console())
	}
}

// off waits until the machine has switched itself off.
func (s *site) off(vm *qemu.VM) {
	s.t.Helper()
	if err := vm.Wait(s.patience()); err != nil {
		s.t.Fatal(err)
	}
}

// dial reaches the enclave as production's parent does.
func (s *site) dial(ctx context.Context) (net.Conn, error) {
	return s.vsock.Dial(ctx, wire.EnclavePort)
}

// eventually repeats f until it gives no error, or one that will not pass.
func (s *site) eventually(what string, passes func(error) bool, f func(context.Context) error) {
	s.t.Helper()
	ctx := s.patience()
	for {
		err := f(ctx)
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
		if ctx.Err() != nil || !passes(err) {
			s.t.Fatalf("%s: %v", what, err)
		}
	}
}

func always(error) bool { return true }

// connect waits until the enclave listens.
func (s *site) connect() (c *signclient.Client) {
	s.t.Helper()
	s.eventually("the enclave does not listen", always, func(ctx context.Context) (err error) {
		c, err = signclient.Connect(ctx, s.dial, signclient.Options{Logger: s.log})
		return err
	})
	s.t.Cleanup(c.Close)
	return c
}

func (s *site) dialKMS(ctx context.Context, _ string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
}

// serveEgress is production's way to KMS, for tests without a whole parent.
func (s *site) serveEgress() {
	s.t.Helper()
	f := egress.Forwarder{Hosts: []string{s.kms.Host()}, Dial: s.dialKMS, Logger: s.log}
	l := s.listen(wire.KMSPort)
	s.run("forwarder", func(ctx context.Context) error { return f.Serve(ctx, l) })
	c := egress.Credentials{Source: egress.Static(accessKeyID, accessSecret, ""), Logger: s.log}
	cl := s.listen(wire.CredsPort)
	s.run("credentials", func(ctx context.Context) error { return c.Serve(ctx, cl) })
}

// ways are how a parent and its enclave reach each other.
type ways struct {
	dial       func(context.Context) (net.Conn, error)
	kms, creds net.Listener
}

// byVsock are the ways to and from the machine.
func (s *site) byVsock() ways {
	s.t.Helper()
	return ways{s.dial, s.listen(wire.KMSPort), s.listen(wire.CredsPort)}
}

// startParent runs production's parent until the test ends.
func (s *site) startParent(w ways, image attestation.Image, raw []byte) {
	s.t.Helper()
	s.run("parent", func(ctx context.Context) error {
		return parent.Run(ctx, parent.Config{
			Store: s.store, EnclaveConfig: raw, Root: attestation.TestRoot(s.ca.Root()), Images: []attestation.Image{image},
			Enclaves:     []parent.Enclave{{Name: "enclave", Dial: w.dial}},
			KMSListeners: []net.Listener{w.kms}, CredentialListeners: []net.Listener{w.creds}, DialKMS: s.dialKMS,
			Credentials: egress.Static(accessKeyID, accessSecret, ""), Logger: s.log,
		})
	})
}
