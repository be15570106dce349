package sign

import (
	"context"
	"time"

	"github.com/keyhold/keyhold/internal/refusal"
)

// maxTogether bounds the batches that are signed at once: more than there are
// keys in use on any machine, and few enough for a suspect to take every share.
const maxTogether = 256

// solo lets batches run side by side, but a suspect without any other, so that it
// takes only itself down. It is made of channels, so that who waits still ends
// with its deadline and its connection.
type solo struct {
	door   chan struct{} // passed by all, held by a suspect until it has ended
	shares chan struct{} // one for each batch at work
}

func newSolo() solo {
	return solo{door: make(chan struct{}, 1), shares: make(chan struct{}, maxTogether)}
}

// enter waits for patience at most. The caller calls leave exactly once where err
// is nil.
func (s *solo) enter(ctx context.Context, alone bool, patience time.Duration) (leave func(), err error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	take := func(c chan struct{}) error {
		select {
		case c <- struct{}{}:
			return nil
		case <-timer.C:
			return refusal.Deadline
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := take(s.door); err != nil {
		return nil, err
	}
	want, got := 1, 0
	if alone {
		want = maxTogether
	}
	leave = func() {
		for range got {
			<-s.shares
		}
		if alone {
			<-s.door
		}
	}
	for ; got < want; got++ {
		if err = take(s.shares); err != nil {
			break
		}
	}
	if !alone {
		<-s.door
	}
	if err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}
