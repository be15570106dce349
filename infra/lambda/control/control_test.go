package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/parent/store"

	main "github.com/keyhold/keyhold/infra/lambda/control"
)

// aws is fleet and hosts; it writes down what it was asked for.
type aws struct {
	did    []string
	broken map[string]error
}

func (a *aws) note(format string, args ...any) error {
	a.did = append(a.did, fmt.Sprintf(format, args...))
	return a.broken[format]
}

func (a *aws) Size(_ context.Context, least, wanted int) error {
	return a.note("size %d %d", least, wanted)
}

func (a *aws) Drain(_ context.Context, instance string) error { return a.note("drain %s", instance) }

func (a *aws) Count(context.Context) (inService, wanted int, err error) {
	return 2, 3, a.note("count")
}

func (a *aws) Proceed(_ context.Context, e main.Event) error {
	return a.note("proceed %s", e.Detail.Instance+" "+e.Detail.Hook+" "+e.Detail.Token)
}

// queue has open batches by shard, each visible since some seconds before now.
type queue struct {
	open   map[int][]int
	broken error
}

var now = time.Date(2026, 11, 21, 4, 0, 0, 0, time.UTC)

func (q queue) CountReady(_ context.Context, shard int) (int, error) {
	return len(q.open[shard]), q.broken
}

func (q queue) Ready(_ context.Context, shard int, until time.Time, limit int, _ string) (store.ReadyPage, error) {
	if until != now || limit != 1 {
		return store.ReadyPage{}, errors.New("want the first that is visible now")
	}
	return store.ReadyPage{Batches: []record.BatchID{record.BatchID(fmt.Sprintf("b-%d", shard))}}, nil
}

func (q queue) Batch(_ context.Context, id record.BatchID) (store.Batch, error) {
	var shard int
	if _, err := fmt.Sscanf(string(id), "b-%d", &shard); err != nil {
		return store.Batch{}, err
	}
	if q.open[shard][0] < 0 {
		return store.Batch{}, store.ErrNotFound
	}
	return store.Batch{VisibleAt: now.Add(-time.Duration(q.open[shard][0]) * time.Second)}, nil
}

func control(a *aws, q queue) (*main.Control, *bytes.Buffer) {
	var out bytes.Buffer
	return &main.Control{
		Name: "keyhold-test", Group: "parents", Least: 2, Fleet: a, Host: a, Queue: q,
		Now: func() time.Time { return now }, Logger: slog.New(slog.DiscardHandler), Out: &out,
	}, &out
}

const ending = `{"detail-type": "EC2 Instance-terminate Lifecycle Action", "detail": {"EC2InstanceId": "i-1", "AutoScalingGroupName": "%s", "LifecycleHookName": "drain", "LifecycleActionToken": "t"}}`

func TestEachEventDoesOneThing(t *testing.T) {
	t.Parallel()
	lost := errors.New("lost")
	for _, test := range []struct {
		name, event string
		broken      map[string]error
		want        []string
		fails       bool
	}{
		{"start", `{"action": "start"}`, nil, []string{"size 2 2"}, false},
		{"stop", `{"action": "stop"}`, nil, []string{"size 0 0"}, false},
		{"start fails", `{"action": "start"}`, map[string]error{"size %d %d": lost}, []string{"size 2 2"}, true},
		{"an instance ends", fmt.Sprintf(ending, "parents"), nil, []string{"drain i-1", "proceed i-1 drain t"}, false},
		{"one that cannot be drained ends too", fmt.Sprintf(ending, "parents"), map[string]error{"drain %s": lost}, []string{"drain i-1", "proceed i-1 drain t"}, false},
		{"the end cannot go on", fmt.Sprintf(ending, "parents"), map[string]error{"proceed %s": lost}, []string{"drain i-1", "proceed i-1 drain t"}, true},
		{"an instance of others ends", fmt.Sprintf(ending, "others"), nil, nil, true},
		{"another action", `{"action": "sign"}`, nil, nil, true},
		{"no action", `{}`, nil, nil, true},
		{"no JSON", `start`, nil, nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a := &aws{broken: test.broken}
			c, _ := control(a, queue{})
			_, err := main.TestingOnlyInvoke(t.Context(), c, test.event)
			if (err != nil) != test.fails {
				t.Errorf("error %v, want one: %v", err, test.fails)
			}
			if diff := cmp.Diff(test.want, a.did); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTheStateIsAnsweredAndPublished(t *testing.T) {
	t.Parallel()
	c, out := control(&aws{}, queue{open: map[int][]int{0: {30, 10}, 7: {900}, 9: {-1}, store.QuarantinedShard: {1, 1, 1}}})
	answer, err := main.TestingOnlyInvoke(t.Context(), c, `{"action": "state"}`)
	if err != nil {
		t.Fatal(err)
	}
	var got main.State
	if err := json.Unmarshal(answer, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(main.State{InService: 2, Wanted: 3, Open: 4, Quarantined: 3, OldestAge: 900}, got); diff != "" {
		t.Error(diff)
	}
	var line struct {
		AWS struct {
			Timestamp         int64
			CloudWatchMetrics []struct {
				Namespace  string
				Dimensions [][]string
				Metrics    []struct{ Name string }
			}
		} `json:"_aws"`
		Stack             string `json:"stack"`
		OpenBatches       int
		OldestOpenSeconds int
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	if line.AWS.Timestamp != now.UnixMilli() || line.Stack != "keyhold-test" || line.OpenBatches != 4 || line.OldestOpenSeconds != 900 ||
		len(line.AWS.CloudWatchMetrics) != 1 || len(line.AWS.CloudWatchMetrics[0].Metrics) != 4 {
		t.Errorf("published: %s", out)
	}
}

func TestAStateThatCannotBeReadIsNotPublished(t *testing.T) {
	t.Parallel()
	c, out := control(&aws{}, queue{broken: errors.New("throttled")})
	if _, err := main.TestingOnlyInvoke(t.Context(), c, `{"action": "state"}`); err == nil || out.Len() > 0 {
		t.Errorf("%v, published %q", err, out)
	}
}
