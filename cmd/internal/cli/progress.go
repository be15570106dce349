package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

const (
	lineEvery = 2 * time.Second // between two plain lines at least
	barWidth  = 72              // columns
)

// Progress shows how far something has come: a bar with rate and time left on a
// terminal, plain lines elsewhere. It is safe for concurrent use.
type Progress struct {
	w     io.Writer
	label string
	now   func() time.Time

	mu       sync.Mutex
	total    int // 0: not known
	done     int
	base     int // done before this run: it does not count for the rate
	started  time.Time
	printed  time.Time // the last plain line
	finished bool

	bars *mpb.Progress // nil: plain lines
	bar  *mpb.Bar
}

// NewProgress starts at 0 of total, where 0 or less is an unknown total. w is
// the command's stderr: stdout belongs to data.
func NewProgress(w io.Writer, label string, total int) *Progress {
	return newProgress(w, label, total, time.Now)
}

func newProgress(w io.Writer, label string, total int, now func() time.Time) *Progress {
	p := &Progress{w: w, label: label, total: max(total, 0), now: now, started: now()}
	p.printed = p.started
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.bars = mpb.New(mpb.WithOutput(f), mpb.WithWidth(barWidth))
		p.bar = p.bars.AddBar(int64(p.total),
			mpb.PrependDecorators(decor.Name(label+" ")),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return p.state() })))
	}
	return p
}

// From says that done of it was there before this run.
func (p *Progress) From(done int) {
	p.mu.Lock()
	p.base, p.done = done, max(p.done, done)
	p.mu.Unlock()
}

// SetTotal changes the total.
func (p *Progress) SetTotal(total int) {
	p.mu.Lock()
	p.total = max(total, 0)
	p.mu.Unlock()
	if p.bar != nil && total > 0 {
		p.bar.SetTotal(int64(total), false)
	}
}

// Set says how much is done altogether. It never goes back.
func (p *Progress) Set(done int) {
	p.mu.Lock()
	p.done = max(p.done, done)
	line := ""
	if now := p.now(); p.bar == nil && !p.finished && now.Sub(p.printed) >= lineEvery {
		p.printed, line = now, p.stateLocked()
	}
	done = p.done
	p.mu.Unlock()
	if p.bar != nil {
		p.bar.SetCurrent(int64(done))
	} else if line != "" {
		p.print(line)
	}
}

// Finish shows the end, whether all was done or not. Nothing is shown after it.
func (p *Progress) Finish() {
	p.mu.Lock()
	if p.finished {
		p.mu.Unlock()
		return
	}
	p.finished = true
	complete := p.total == 0 || p.done >= p.total
	line := p.stateLocked()
	done := p.done
	p.mu.Unlock()
	if p.bar == nil {
		p.print(line)
		return
	}
	if complete {
		p.bar.SetCurrent(int64(done))
		p.bar.SetTotal(int64(done), true)
	} else {
		p.bar.Abort(false)
	}
	p.bars.Wait()
}

// print loses the line where stderr is gone; the command goes on.
func (p *Progress) print(state string) { _, _ = fmt.Fprintf(p.w, "%s: %s\n", p.label, state) }

func (p *Progress) state() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stateLocked()
}

// stateLocked says all that is known: "1200 of 5000 (24.0%), 400/s, 10s left".
func (p *Progress) stateLocked() string {
	took := p.now().Sub(p.started)
	rate := 0.0
	if took > 0 {
		rate = float64(p.done-p.base) / took.Seconds()
	}
	s := fmt.Sprint(p.done)
	if p.total > 0 {
		s = fmt.Sprintf("%d of %d (%.1f%%)", p.done, p.total, 100*float64(p.done)/float64(p.total))
	}
	s += fmt.Sprintf(", %s/s", rateText(rate))
	switch left := p.total - p.done; {
	case p.finished:
		s += ", took " + short(took)
	case left > 0 && rate > 0:
		s += ", " + short(time.Duration(float64(left)/rate*float64(time.Second))) + " left"
	}
	return s
}

func rateText(rate float64) string {
	if rate < 10 {
		return fmt.Sprintf("%.1f", rate)
	}
	return fmt.Sprintf("%.0f", rate)
}

// short rounds to what a person reads.
func short(d time.Duration) string {
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
