package stack

import (
	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awscloudtrail"
	"github.com/aws/aws-cdk-go/awscdk/v2/awscloudwatch"
	"github.com/aws/aws-cdk-go/awscdk/v2/awscloudwatchactions"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsevents"
	"github.com/aws/aws-cdk-go/awscdk/v2/awseventstargets"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awssns"
	"github.com/aws/aws-cdk-go/awscdk/v2/awssnssubscriptions"
	"github.com/aws/jsii-runtime-go"
)

// metricNamespace of the control function, the agent on the hosts, and the parents.
const metricNamespace = "Keyhold"

// metric of this stack, with one more dimension where there is one.
func (b *build) metric(name, statistic string, minutes int, dimension ...string) awscloudwatch.Metric {
	dimensions := map[string]*string{"stack": str(b.t.Name())}
	for i := 0; i+1 < len(dimension); i += 2 {
		dimensions[dimension[i]] = str(dimension[i+1])
	}
	return awscloudwatch.NewMetric(&awscloudwatch.MetricProps{
		Namespace: str(metricNamespace), MetricName: str(name), Statistic: str(statistic), DimensionsMap: &dimensions,
		Period: awscdk.Duration_Minutes(num(minutes)),
	})
}

// alarm rings when a metric is at or above a threshold, or at or below it where less is set.
type alarm struct {
	id, text  string
	metric    awscloudwatch.IMetric
	threshold float64
	periods   int
	less      bool
	silence   bool // no data is bad too
}

func (b *build) alarm(a alarm) awscloudwatch.Alarm {
	compare, missing := awscloudwatch.ComparisonOperator_GREATER_THAN_OR_EQUAL_TO_THRESHOLD, awscloudwatch.TreatMissingData_NOT_BREACHING
	if a.less {
		compare = awscloudwatch.ComparisonOperator_LESS_THAN_OR_EQUAL_TO_THRESHOLD
	}
	if a.silence {
		missing = awscloudwatch.TreatMissingData_BREACHING
	}
	made := awscloudwatch.NewAlarm(b.stack, str(a.id), &awscloudwatch.AlarmProps{
		AlarmDescription: str(a.text), Metric: a.metric, Threshold: jsii.Number(a.threshold), EvaluationPeriods: num(a.periods),
		ComparisonOperator: compare, TreatMissingData: missing, ActionsEnabled: jsii.Bool(!b.t.Idle()),
	})
	made.AddAlarmAction(awscloudwatchactions.NewSnsAction(b.topic))
	b.alarms = append(b.alarms, made)
	return made
}

// notify makes the topic, and the alarms that stop an instance refresh and roll it
// back: those that a new image or config can cause.
func (b *build) notify() {
	b.topic = awssns.NewTopic(b.stack, str("Alarms"), &awssns.TopicProps{MasterKey: b.dataKey, EnforceSSL: yes})
	// With a policy of its own, which the rules need, a topic no longer takes what
	// alarms send unless that is said too.
	b.topic.AddToResourcePolicy(awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
		Sid: str("Alarms"), Principals: &[]awsiam.IPrincipal{awsiam.NewServicePrincipal(str("cloudwatch.amazonaws.com"), nil)},
		Actions: strs("sns:Publish"), Resources: &[]*string{b.topic.TopicArn()},
		Conditions: &map[string]any{"StringEquals": map[string]any{"aws:SourceAccount": b.t.Account}},
	}))
	if b.t.Email != "" {
		b.topic.AddSubscription(awssnssubscriptions.NewEmailSubscription(str(b.t.Email), nil))
	}
	b.rollback = []awscloudwatch.Alarm{
		b.alarm(alarm{
			id: "AttestationFails", text: "An enclave does not prove to be what is wanted: docs/runbook.md",
			metric: b.metric("keyhold_attestation_failures_total", "Sum", 5), threshold: 1, periods: 1,
		}),
		b.alarm(alarm{
			id: "KeysRefused", text: "An enclave refuses to open sealed keys: docs/runbook.md",
			metric: b.metric("keyhold_sealed_keys_refused_total", "Sum", 5), threshold: 1, periods: 1,
		}),
	}
}

// Thresholds, where one is not simply the first of its kind.
const (
	backlogBatches = 2000 // a million records at 500 a batch
	backlogSeconds = 900
	steals         = 5 // in five minutes; one comes with every host that dies
)

func (b *build) observe() {
	least := float64(b.instances())
	state := b.t.Profile.StateEvery
	for _, a := range []alarm{
		{id: "Backlog", text: "Many batches wait to be signed", metric: b.metric("OpenBatches", "Maximum", state), threshold: backlogBatches, periods: 15},
		{id: "BacklogAge", text: "A batch has waited for long: does any parent run?", metric: b.metric("OldestOpenSeconds", "Maximum", state), threshold: backlogSeconds, periods: 3},
		{id: "NoReport", text: "The backlog is not reported: the control function fails", metric: b.metric("OpenBatches", "SampleCount", 15), threshold: 0, periods: 2, less: true, silence: true},
		{id: "Quarantined", text: "A batch failed five times and waits for an operator: keyhold batches retry", metric: b.metric("QuarantinedBatches", "Maximum", state), threshold: 1, periods: 1},
		{id: "Refusals", text: "Records are refused: keyhold records export tells which and why", metric: b.metric("keyhold_records_total", "Sum", 5, "state", "REFUSED"), threshold: 1, periods: 1},
		{id: "LeaseSteals", text: "Leases run out and are taken over: hosts die, or signing is slower than the lease", metric: b.metric("keyhold_lease_steals_total", "Sum", 5), threshold: steals, periods: 1},
		{id: "EnclaveDown", text: "An enclave is not up", metric: b.metric("keyhold_enclave_up", "Minimum", 5), threshold: 0, periods: 2, less: true, silence: true},
		{id: "HostsNotReady", text: "Fewer hosts are ready than there shall be", metric: b.ready.Metrics().HealthyHostCount(nil), threshold: least - 1, periods: 15, less: true, silence: true},
		{id: "StoreFails", text: "DynamoDB refuses or fails", metric: b.metric("keyhold_store_failures_total", "Sum", 5), threshold: 10, periods: 2},
		{id: "FilesPutAside", text: "A file could not be imported, three times: the message is in the dead-letter queue", metric: b.dead.MetricApproximateNumberOfMessagesVisible(nil), threshold: 1, periods: 1},
		{id: "ControlFails", text: "The control function fails", metric: b.control.MetricErrors(nil), threshold: 1, periods: 2},
	} {
		b.alarm(a)
	}
	b.keyEvents()
	if b.t.Profile.Trail {
		b.trail()
	}
	b.dashboard()
}

// keyEvents tells of what is done to the key that is the lock of all this, by
// whomever. CloudTrail delivers them within minutes.
func (b *build) keyEvents() {
	key := []any{b.keyring.AttrArn()}
	ids := []any{b.keyring.AttrArn(), b.keyring.AttrKeyId()}
	changed := awsevents.NewRule(b.stack, str("KeyChanged"), &awsevents.RuleProps{
		Description: str("Somebody changes who gets the key, or takes it away"),
		EventPattern: &awsevents.EventPattern{Source: strs("aws.kms"), DetailType: strs("AWS API Call via CloudTrail"), Detail: &map[string]any{
			"eventSource": []any{"kms.amazonaws.com"},
			"eventName":   []any{"PutKeyPolicy", "CreateGrant", "ScheduleKeyDeletion", "DisableKey"},
			"$or": []any{
				map[string]any{"resources": map[string]any{"ARN": key}},
				map[string]any{"requestParameters": map[string]any{"keyId": ids}},
			},
		}},
	})
	// What KMS writes down of a caller with an attestation document is below
	// additionalEventData.recipient (KMS developer guide, "Monitoring requests").
	used := awsevents.NewRule(b.stack, str("KeyUsedWithoutAttestation"), &awsevents.RuleProps{
		Description: str("KMS gave the key to somebody who showed no attestation document"),
		EventPattern: &awsevents.EventPattern{Source: strs("aws.kms"), DetailType: strs("AWS API Call via CloudTrail"), Detail: &map[string]any{
			"eventSource": []any{"kms.amazonaws.com"},
			"eventName":   []any{"Decrypt", "GenerateDataKey", "GenerateDataKeyPair", "GenerateDataKeyWithoutPlaintext", "GenerateDataKeyPairWithoutPlaintext", "ReEncrypt", "Encrypt"},
			"errorCode":   []any{map[string]any{"exists": false}},
			"resources":   map[string]any{"ARN": key},
			"additionalEventData": map[string]any{"recipient": map[string]any{
				"attestationDocumentEnclaveImageDigest": []any{map[string]any{"exists": false}},
			}},
		}},
	})
	// Decrypt only reads, in the eyes of CloudTrail, and rules see no such event
	// unless they are told to.
	rule := used.Node().DefaultChild().(awsevents.CfnRule) //nolint:errcheck,forcetypeassert // an L2 rule has this child
	rule.SetState(str("ENABLED_WITH_ALL_CLOUDTRAIL_MANAGEMENT_EVENTS"))
	for _, r := range []awsevents.Rule{changed, used} {
		r.AddTarget(awseventstargets.NewSnsTopic(b.topic, nil))
	}
}

// trail is there because events of CloudTrail come by a trail, and an account may
// have none. Files of it are signed by AWS.
func (b *build) trail() {
	awscloudtrail.NewTrail(b.stack, str("Trail"), &awscloudtrail.TrailProps{
		TrailName: str(b.t.Name()), Bucket: b.logs, S3KeyPrefix: str("trail"), EncryptionKey: b.dataKey, EnableFileValidation: yes,
		IsMultiRegionTrail: no, IncludeGlobalServiceEvents: no, ManagementEvents: awscloudtrail.ReadWriteType_ALL,
	})
}

func (b *build) dashboard() {
	graph := func(title string, metrics ...awscloudwatch.IMetric) awscloudwatch.IWidget {
		return awscloudwatch.NewGraphWidget(&awscloudwatch.GraphWidgetProps{Title: str(title), Left: &metrics, Width: num(8)})
	}
	awscloudwatch.NewDashboard(b.stack, str("Dashboard"), &awscloudwatch.DashboardProps{
		DashboardName: str(b.t.Name()),
		Widgets: &[]*[]awscloudwatch.IWidget{
			{awscloudwatch.NewAlarmStatusWidget(&awscloudwatch.AlarmStatusWidgetProps{Alarms: references(b.alarms), Width: num(24)})},
			{
				graph("Records", b.metric("keyhold_records_total", "Sum", 5, "state", "SIGNED"), b.metric("keyhold_records_total", "Sum", 5, "state", "REFUSED")),
				graph("Batches that wait", b.metric("OpenBatches", "Maximum", b.t.Profile.StateEvery), b.metric("QuarantinedBatches", "Maximum", b.t.Profile.StateEvery)),
				graph("Longest wait in seconds", b.metric("OldestOpenSeconds", "Maximum", b.t.Profile.StateEvery)),
			},
			{
				graph("Claims by how they end", b.metric("keyhold_batches_total", "Sum", 5, "end", "committed"), b.metric("keyhold_batches_total", "Sum", 5, "end", "released"),
					b.metric("keyhold_batches_total", "Sum", 5, "end", "fenced"), b.metric("keyhold_batches_total", "Sum", 5, "end", "quarantined")),
				graph("Leases taken over", b.metric("keyhold_lease_steals_total", "Sum", 5)),
				graph("Enclaves up, hosts ready", b.metric("keyhold_enclave_up", "Minimum", 5), b.ready.Metrics().HealthyHostCount(nil)),
			},
			{
				graph("Attestations that fail", b.metric("keyhold_attestation_failures_total", "Sum", 5)),
				graph("Failures of the store", b.metric("keyhold_store_failures_total", "Sum", 5)),
				graph("Files that wait, and put aside", b.queue.MetricApproximateNumberOfMessagesVisible(nil), b.dead.MetricApproximateNumberOfMessagesVisible(nil)),
			},
		},
	})
}
