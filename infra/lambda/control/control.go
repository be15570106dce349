package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"
)

// The actions.
const (
	actionStart = "start" // as many instances as the profile wants
	actionStop  = "stop"  // none; each drains before it goes
	actionState = "state" // say how things stand, and publish it as metrics
)

// lifecycle is the detail-type of what Auto Scaling sends when an instance is to end.
const lifecycle = "EC2 Instance-terminate Lifecycle Action"

// Event is what the function is called with: an action, or what EventBridge
// passes on of Auto Scaling.
type Event struct {
	Action     string `json:"action"`
	DetailType string `json:"detail-type"`
	Detail     struct {
		Instance string `json:"EC2InstanceId"`
		Group    string `json:"AutoScalingGroupName"`
		Hook     string `json:"LifecycleHookName"`
		Token    string `json:"LifecycleActionToken"`
	} `json:"detail"`
}

// Fleet is the Auto Scaling group.
type Fleet interface {
	// Size sets how many instances there shall be.
	Size(ctx context.Context, least, wanted int) error
	// Count returns how many are in service, and how many there shall be.
	Count(ctx context.Context) (inService, wanted int, err error)
	// Proceed lets the end of an instance go on.
	Proceed(ctx context.Context, e Event) error
}

// Host runs a document on an instance.
type Host interface {
	// Drain returns once the parent there has given its batches back.
	Drain(ctx context.Context, instance string) error
}

// Queue is what is read of the tables.
type Queue interface {
	Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error)
	CountReady(ctx context.Context, shard int) (int, error)
	Batch(ctx context.Context, id record.BatchID) (store.Batch, error)
}

// Control starts and stops the fleet and reports its state. It has no way to sign,
// to read a result, or to change what is stored.
type Control struct {
	Name   string // of the stack, a dimension of the metrics
	Group  string // of Auto Scaling
	Least  int    // instances
	Fleet  Fleet
	Host   Host
	Queue  Queue
	Now    func() time.Time
	Logger *slog.Logger
	Out    io.Writer // metrics go here in the embedded format of CloudWatch
}

// State is what actionState answers.
type State struct {
	InService   int `json:"instances_in_service"`
	Wanted      int `json:"instances_wanted"`
	Open        int `json:"batches_open"`
	Quarantined int `json:"batches_quarantined"`
	OldestAge   int `json:"oldest_open_seconds"` // since the oldest open batch could have been claimed
}

var errAction = errors.New("want action start, stop or state")

// Handle is the function.
func (c *Control) Handle(ctx context.Context, e Event) (*State, error) {
	if e.DetailType == lifecycle {
		return nil, c.drain(ctx, e)
	}
	switch e.Action {
	case actionStart:
		c.Logger.InfoContext(ctx, "fleet starts", slog.Int("instances", c.Least))
		return nil, c.Fleet.Size(ctx, c.Least, c.Least)
	case actionStop:
		c.Logger.InfoContext(ctx, "fleet stops")
		return nil, c.Fleet.Size(ctx, 0, 0)
	case actionState:
		return c.state(ctx)
	}
	return nil, errAction
}

// drain lets the instance end also where it cannot be drained: its leases run out
// by themselves, and a parent that hangs must not hold up the one that replaces it.
func (c *Control) drain(ctx context.Context, e Event) error {
	if e.Detail.Group != c.Group || e.Detail.Instance == "" {
		return errors.New("the event is of another group")
	}
	if err := c.Host.Drain(ctx, e.Detail.Instance); err != nil {
		c.Logger.WarnContext(ctx, "instance not drained", slog.String("instance", e.Detail.Instance), slog.Any("error", err))
	}
	if err := c.Fleet.Proceed(ctx, e); err != nil {
		return fmt.Errorf("let instance %s end: %w", e.Detail.Instance, err)
	}
	return nil
}

func (c *Control) state(ctx context.Context) (*State, error) {
	var s State
	var err error
	if s.InService, s.Wanted, err = c.Fleet.Count(ctx); err != nil {
		return nil, fmt.Errorf("count the instances: %w", err)
	}
	for shard := range store.ReadyShards {
		n, err := c.Queue.CountReady(ctx, shard)
		if err != nil {
			return nil, fmt.Errorf("count the open batches: %w", err)
		}
		if s.Open += n; n == 0 {
			continue
		}
		age, err := c.oldest(ctx, shard)
		if err != nil {
			return nil, err
		}
		s.OldestAge = max(s.OldestAge, int(age.Seconds()))
	}
	if s.Quarantined, err = c.Queue.CountReady(ctx, store.QuarantinedShard); err != nil {
		return nil, fmt.Errorf("count the quarantined batches: %w", err)
	}
	return &s, c.publish(&s)
}

// oldest is how long the first batch of a shard has been open to be claimed.
func (c *Control) oldest(ctx context.Context, shard int) (time.Duration, error) {
	page, err := c.Queue.Ready(ctx, shard, c.Now(), 1, "")
	if err != nil {
		return 0, fmt.Errorf("find the oldest open batch: %w", err)
	}
	if len(page.Batches) == 0 {
		return 0, nil // all of them are being signed
	}
	b, err := c.Queue.Batch(ctx, page.Batches[0])
	switch {
	case errors.Is(err, store.ErrNotFound): // the index is behind
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("read the oldest open batch: %w", err)
	}
	return max(0, c.Now().Sub(b.VisibleAt)), nil
}

// Namespace of all metrics of Keyhold.
const Namespace = "Keyhold"

// publish writes one line in CloudWatch's embedded metric format, which needs no
// permission and no call.
func (c *Control) publish(s *State) error {
	type metric struct {
		Name string
		Unit string
	}
	names := []metric{{"OpenBatches", "Count"}, {"QuarantinedBatches", "Count"}, {"OldestOpenSeconds", "Seconds"}, {"InstancesInService", "Count"}}
	line := map[string]any{
		"_aws": map[string]any{
			"Timestamp":         c.Now().UnixMilli(),
			"CloudWatchMetrics": []any{map[string]any{"Namespace": Namespace, "Dimensions": [][]string{{"stack"}}, "Metrics": names}},
		},
		"stack":       c.Name,
		"OpenBatches": s.Open, "QuarantinedBatches": s.Quarantined, "OldestOpenSeconds": s.OldestAge, "InstancesInService": s.InService,
	}
	b, err := json.Marshal(line)
	if err != nil {
		return fmt.Errorf("publish the state: %w", err)
	}
	if _, err := c.Out.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("publish the state: %w", err)
	}
	return nil
}
