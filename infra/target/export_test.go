package target

// TestingOnlyFits calls fits.
func TestingOnlyFits(r *Release, i Instance) error { return r.fits(i) }
