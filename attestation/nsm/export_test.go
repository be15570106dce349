package nsm

// TestingOnlyDevice is the part of hf/nsm's session that a Session uses.
type TestingOnlyDevice = device

// TestingOnlySession is a Session over a device that is not the kernel's.
func TestingOnlySession(d TestingOnlyDevice) Session { return &session{dev: d} }
