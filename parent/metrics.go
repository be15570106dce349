package parent

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/keyhold/keyhold/internal/record"
	"github.com/keyhold/keyhold/internal/wire"
	"github.com/keyhold/keyhold/parent/pipeline"
	"github.com/keyhold/keyhold/parent/store"
)

// metrics are counted where the facts are: claims and commits at the store,
// requests at the wire. So they hold whatever the pipeline looks like.
type metrics struct {
	registry     *prometheus.Registry
	records      *prometheus.CounterVec // state
	batches      *prometheus.CounterVec // end
	claims       *prometheus.CounterVec // outcome
	steals       prometheus.Counter
	receipts     prometheus.Counter
	up           *prometheus.GaugeVec   // enclave
	attestFailed *prometheus.CounterVec // enclave, code
	keysRefused  *prometheus.CounterVec // enclave
	sign         prometheus.Histogram
	inFlight     prometheus.Gauge
	store        *prometheus.HistogramVec // operation
	storeFailed  *prometheus.CounterVec   // operation
	batch        prometheus.Histogram
	connections  *prometheus.GaugeVec // enclave
}

// Values of labels.
const (
	endCommitted   = "committed"
	endReleased    = "released"
	endFenced      = "fenced"
	endQuarantined = "quarantined"
	claimWon       = "won"
	claimConflict  = "conflict"
	claimUnknown   = "error"
)

func newMetrics() *metrics {
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "keyhold", Name: name, Help: help}, labels)
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "keyhold", Name: name, Help: help})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		records:  counters("records_total", "Records of batches that this parent committed, by state.", "state"),
		batches:  counters("batches_total", "Claims of this parent that ended, by how.", "end"),
		claims:   counters("claims_total", "Claims that this parent tried, by outcome.", "outcome"),
		steals:   counter("lease_steals_total", "Claims that took over a lease that had run out or was fenced off."),
		receipts: counter("receipts_total", "Receipts stored."),
		up: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "keyhold", Name: "enclave_up", Help: "1 while the enclave is attested and has its keyring.",
		}, []string{"enclave"}),
		attestFailed: counters("attestation_failures_total", "Attestations that did not verify, by code.", "enclave", "code"),
		keysRefused:  counters("sealed_keys_refused_total", "Sealed keys that the enclave refused to open.", "enclave"),
		sign: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "keyhold", Name: "sign_seconds", Help: "Time from a sign request to its answer.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14), // 1 ms to 8 s; a lease is 10 s
		}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "keyhold", Name: "sign_in_flight", Help: "Sign requests without an answer.",
		}),
		store: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "keyhold", Name: "store_seconds", Help: "Time of one operation on the store, retries included.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15), // 0.5 ms to 8 s
		}, []string{"operation"}),
		storeFailed: counters("store_failures_total", "Operations on the store whose outcome was an error.", "operation"),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "keyhold", Name: "batch_seconds", Help: "Time from a claim to its commit.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 14), // 2 ms to 16 s
		}),
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "keyhold", Name: "enclave_connections", Help: "Connections that sign, each a lane of its enclave.",
		}, []string{"enclave"}),
	}
	m.registry.MustRegister(
		m.records, m.batches, m.claims, m.steals, m.receipts, m.up, m.attestFailed, m.keysRefused, m.sign, m.inFlight, m.store,
		m.storeFailed, m.batch, m.connections,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	for _, end := range []string{endCommitted, endReleased, endFenced, endQuarantined} {
		m.batches.WithLabelValues(end)
	}
	for _, outcome := range []string{claimWon, claimConflict, claimUnknown} {
		m.claims.WithLabelValues(outcome)
	}
	for _, state := range []record.State{record.Signed, record.Refused} {
		m.records.WithLabelValues(string(state))
	}
	return m
}

// observer takes what only the pipeline knows.
func (m *metrics) observer() pipeline.Observer {
	return pipeline.Observer{
		Committed:    func(_ *store.Batch, _ int, took time.Duration) { m.batch.Observe(took.Seconds()) },
		StoreFailed:  func(op string) { m.storeFailed.WithLabelValues(op).Inc() },
		Connected:    func(enclave string) { m.connections.WithLabelValues(enclave).Inc() },
		Disconnected: func(enclave string) { m.connections.WithLabelValues(enclave).Dec() },
	}
}

// trace measures sign requests; it is a signclient.Options.Trace.
func (m *metrics) trace(t wire.Type) func(error) {
	if t != wire.TypeSign {
		return func(error) {}
	}
	m.inFlight.Inc()
	timer := prometheus.NewTimer(m.sign)
	return func(error) {
		timer.ObserveDuration()
		m.inFlight.Dec()
	}
}

// measured counts and times what the pipeline does to a store.
type measured struct {
	store.Store
	m   *metrics
	now func() time.Time
}

func (s *measured) time(operation string) func() {
	begin := s.now()
	return func() { s.m.store.WithLabelValues(operation).Observe(s.now().Sub(begin).Seconds()) }
}

// Claim implements store.Leases.
func (s *measured) Claim(ctx context.Context, c store.Claim) (store.Batch, error) {
	defer s.time("claim")()
	b, err := s.Store.Claim(ctx, c)
	switch {
	case err == nil:
		s.m.claims.WithLabelValues(claimWon).Inc()
		if c.TakeOver {
			s.m.steals.Inc()
		}
	case errors.Is(err, store.ErrTaken):
		s.m.claims.WithLabelValues(claimConflict).Inc()
	default:
		s.m.claims.WithLabelValues(claimUnknown).Inc()
	}
	return b, err
}

// Commit implements store.Leases.
func (s *measured) Commit(ctx context.Context, c store.Commit) error {
	defer s.time("commit")()
	err := s.Store.Commit(ctx, c)
	switch {
	case err == nil:
		s.m.batches.WithLabelValues(endCommitted).Inc()
		s.m.records.WithLabelValues(string(record.Signed)).Add(float64(c.Batch.Count - c.Refused))
		s.m.records.WithLabelValues(string(record.Refused)).Add(float64(c.Refused))
	case errors.Is(err, store.ErrFenced):
		s.m.batches.WithLabelValues(endFenced).Inc()
	}
	return err
}

// Release implements store.Leases.
func (s *measured) Release(ctx context.Context, b store.Batch, e store.End) error {
	defer s.time("release")()
	err := s.Store.Release(ctx, b, e)
	switch {
	case errors.Is(err, store.ErrFenced):
		s.m.batches.WithLabelValues(endFenced).Inc()
	case err == nil && e.State == record.Quarantined:
		s.m.batches.WithLabelValues(endQuarantined).Inc()
	case err == nil:
		s.m.batches.WithLabelValues(endReleased).Inc()
	}
	return err
}

// PutReceipt implements store.Archive.
func (s *measured) PutReceipt(ctx context.Context, r store.Receipt) error {
	defer s.time("put_receipt")()
	err := s.Store.PutReceipt(ctx, r)
	if err == nil {
		s.m.receipts.Inc()
	}
	return err
}

// Payload implements store.Queue.
func (s *measured) Payload(ctx context.Context, id record.BatchID) ([]byte, error) {
	defer s.time("payload")()
	return s.Store.Payload(ctx, id)
}

// Batch implements store.Queue.
func (s *measured) Batch(ctx context.Context, id record.BatchID) (store.Batch, error) {
	defer s.time("batch")()
	return s.Store.Batch(ctx, id)
}

// Ready implements store.Queue.
func (s *measured) Ready(ctx context.Context, shard int, until time.Time, limit int, page string) (store.ReadyPage, error) {
	defer s.time("ready")()
	return s.Store.Ready(ctx, shard, until, limit, page)
}

// Idle implements store.Leases.
func (s *measured) Idle(ctx context.Context, pool string, shard, limit int) ([]store.IdleKey, error) {
	defer s.time("idle")()
	return s.Store.Idle(ctx, pool, shard, limit)
}
