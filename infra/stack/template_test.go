package stack_test

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/keyhold/keyhold/parent/store/dynamo"

	"github.com/keyhold/keyhold/infra/target"
	"github.com/keyhold/keyhold/infra/target/targettest"
)

// each runs a test on every variant.
func each(t *testing.T, f func(t *testing.T, v variant, m template)) {
	t.Helper()
	for _, v := range variants {
		t.Run(v.String(), func(t *testing.T) { f(t, v, running(t, v)) })
	}
}

func TestNothingLeadsToTheInternet(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		for _, kind := range []string{
			"AWS::EC2::InternetGateway", "AWS::EC2::NatGateway", "AWS::EC2::EIP", "AWS::EC2::Route", "AWS::EC2::KeyPair",
			"AWS::EC2::VPCPeeringConnection", "AWS::EC2::TransitGatewayAttachment",
		} {
			if n := len(m.resources(kind)); n != 0 {
				t.Errorf("%d of %s", n, kind)
			}
		}
		zones := map[any]bool{}
		for _, s := range m.resources("AWS::EC2::Subnet") {
			if zones[s.properties["AvailabilityZone"]] = true; s.properties["MapPublicIpOnLaunch"] != false {
				t.Errorf("%s gives public addresses", s.id)
			}
		}
		if len(zones) != 2 {
			t.Errorf("%d zones, want 2", len(zones))
		}
		if got := m.one(t, "AWS::ElasticLoadBalancingV2::LoadBalancer", "").properties["Scheme"]; got != "internal" {
			t.Errorf("the load balancer is %v", got)
		}
		for _, g := range m.resources("AWS::EC2::SecurityGroup") {
			if g.properties["SecurityGroupIngress"] != nil {
				t.Errorf("%s lets addresses in: %v", g.id, g.properties["SecurityGroupIngress"])
			}
		}
		m.one(t, "AWS::EC2::FlowLog", "")
	})
}

func TestEveryEndpointHasAPolicyForThisAccount(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		want := map[string]int{"dev": 7, "prod": 8}[v.profile]
		all := m.resources("AWS::EC2::VPCEndpoint")
		if len(all) != want {
			t.Errorf("%d endpoints, want %d", len(all), want)
		}
		for _, e := range all {
			for _, s := range list(at(t, e.properties, "PolicyDocument", "Statement")) {
				text, err := json.Marshal(s)
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(text), `"aws:PrincipalAccount":"111122223333"`) && !strings.Contains(string(text), "al2023-repos") {
					t.Errorf("%s lets everybody through: %s", e.id, text)
				}
			}
		}
	})
}

func TestHostsAreEnclaveHosts(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		data := at(t, m.one(t, "AWS::EC2::LaunchTemplate", "").properties, "LaunchTemplateData")
		got := object{}
		for _, k := range []string{"EnclaveOptions", "InstanceType", "ImageId", "MetadataOptions", "KeyName", "BlockDeviceMappings"} {
			got[k] = data.(object)[k]
		}
		want := object{
			"EnclaveOptions": object{"Enabled": true}, "ImageId": targettest.AMI, "KeyName": nil,
			"InstanceType": map[target.Arch]string{target.AMD64: "c6a.xlarge", target.ARM64: "c6g.large"}[v.arch],
			"MetadataOptions": object{
				"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1.0, "InstanceMetadataTags": "disabled",
			},
			"BlockDeviceMappings": []any{object{"DeviceName": "/dev/xvda", "Ebs": object{
				"DeleteOnTermination": true, "Encrypted": true, "VolumeSize": 16.0, "VolumeType": "gp3",
			}}},
		}
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

func TestTheFleetIsRefreshedCarefullyAndDrained(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		group := m.one(t, "AWS::AutoScaling::AutoScalingGroup", "")
		least := map[string]string{"dev": "1", "prod": "2"}[v.profile]
		if group.properties["MinSize"] != least || group.properties["HealthCheckType"] != "ELB" || len(list(group.properties["VPCZoneIdentifier"])) != 2 {
			t.Errorf("%v instances, health by %v, in %v", group.properties["MinSize"], group.properties["HealthCheckType"], group.properties["VPCZoneIdentifier"])
		}
		refresh := at(t, group.object, "UpdatePolicy", "AutoScalingInstanceRefresh")
		text, err := json.Marshal(refresh)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`"BakeTime":600`, `"MinHealthyPercentage":100`, "AttestationFails", "KeysRefused"} {
			if !strings.Contains(string(text), want) {
				t.Errorf("the refresh says nothing of %s: %s", want, text)
			}
		}
		hook := m.one(t, "AWS::AutoScaling::LifecycleHook", "").properties
		if hook["LifecycleTransition"] != "autoscaling:EC2_INSTANCE_TERMINATING" || hook["DefaultResult"] != "CONTINUE" {
			t.Errorf("hook: %v", hook)
		}
		check := m.one(t, "AWS::ElasticLoadBalancingV2::TargetGroup", "").properties
		if check["HealthCheckPath"] != "/readyz" || check["HealthCheckProtocol"] != "HTTP" || check["Port"] != 9463.0 {
			t.Errorf("health check: %v", check)
		}
	})
}

func TestTheTablesAreThoseOfTheStore(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		prefix := "keyhold-" + v.profile + "-"
		var names []string
		for _, in := range dynamo.Tables(prefix) {
			names = append(names, *in.TableName)
			sameTable(t, v, m, in)
		}
		if n := len(m.resources("AWS::DynamoDB::Table")); n != len(names) {
			t.Errorf("%d tables, and the store has %d", n, len(names))
		}
	})
}

// sameTable compares the layout as the store would send it with the template.
func sameTable(t *testing.T, v variant, m template, in *dynamodb.CreateTableInput) {
	t.Helper()
	for _, r := range m.resources("AWS::DynamoDB::Table") {
		if r.properties["TableName"] != *in.TableName {
			continue
		}
		want := layout{BillingMode: string(in.BillingMode)}
		for _, k := range in.KeySchema {
			want.KeySchema = append(want.KeySchema, key{*k.AttributeName, string(k.KeyType)})
		}
		for _, a := range in.AttributeDefinitions {
			want.AttributeDefinitions = append(want.AttributeDefinitions, attribute{*a.AttributeName, string(a.AttributeType)})
		}
		for _, g := range in.GlobalSecondaryIndexes {
			i := index{IndexName: *g.IndexName, Projection: projection{string(g.Projection.ProjectionType), g.Projection.NonKeyAttributes}}
			for _, k := range g.KeySchema {
				i.KeySchema = append(i.KeySchema, key{*k.AttributeName, string(k.KeyType)})
			}
			want.GlobalSecondaryIndexes = append(want.GlobalSecondaryIndexes, i)
		}
		text, err := json.Marshal(r.properties)
		if err != nil {
			t.Fatal(err)
		}
		var got layout
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		byName := func(a, b attribute) int { return strings.Compare(a.AttributeName, b.AttributeName) }
		slices.SortFunc(got.AttributeDefinitions, byName)
		slices.SortFunc(want.AttributeDefinitions, byName)
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", *in.TableName, diff)
		}
		kept(t, v, r)
		return
	}
	t.Errorf("there is no table %s", *in.TableName)
}

type (
	layout struct {
		BillingMode            string
		KeySchema              []key
		AttributeDefinitions   []attribute
		GlobalSecondaryIndexes []index
	}
	key       struct{ AttributeName, KeyType string }
	attribute struct{ AttributeName, AttributeType string }
	index     struct {
		IndexName  string
		KeySchema  []key
		Projection projection
	}
	projection struct {
		ProjectionType   string
		NonKeyAttributes []string
	}
)

// kept: nothing of a table ends by itself, and in prod not with the stack either.
func kept(t *testing.T, v variant, r resource) {
	t.Helper()
	prod := v.profile == "prod"
	policy := map[bool]string{true: "Retain", false: "Delete"}[prod]
	sse, _ := r.properties["SSESpecification"].(object)
	switch {
	case r.properties["DeletionProtectionEnabled"] != prod, r.object["DeletionPolicy"] != policy, r.object["UpdateReplacePolicy"] != policy:
		t.Errorf("%s: deletion protection %v, policies %v and %v", r.id, r.properties["DeletionProtectionEnabled"], r.object["DeletionPolicy"], r.object["UpdateReplacePolicy"])
	case at(t, r.properties, "PointInTimeRecoverySpecification", "PointInTimeRecoveryEnabled") != true:
		t.Errorf("%s: no recovery", r.id)
	case sse["SSEEnabled"] != true || sse["KMSMasterKeyId"] == nil:
		t.Errorf("%s: encrypted with %v", r.id, sse)
	case r.properties["TimeToLiveSpecification"] != nil:
		t.Errorf("%s: items of it end", r.id)
	}
}

func TestKeysAndTheRoleOutliveAProdStack(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		policy := map[string]string{"prod": "Retain", "dev": "Delete"}[v.profile]
		for _, r := range append(m.resources("AWS::KMS::Key"), m.one(t, "AWS::IAM::Role", "ParentRole")) {
			got, _ := r.object["DeletionPolicy"].(string)
			if got == "" {
				got = "Delete" // what CloudFormation does where nothing is said
			}
			if got != policy {
				t.Errorf("%s: %s, want %s", r.id, got, policy)
			}
			if r.kind == "AWS::KMS::Key" && r.properties["EnableKeyRotation"] != true {
				t.Errorf("%s does not rotate", r.id)
			}
		}
	})
}

func TestTheDataKeyIsUsedThroughServicesOnly(t *testing.T) {
	m := running(t, variant{"prod", target.AMD64})
	for _, s := range list(at(t, m.one(t, "AWS::KMS::Key", "DataKey").properties, "KeyPolicy", "Statement")) {
		text, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		uses := strings.Contains(string(text), "kms:Decrypt") || strings.Contains(string(text), "kms:CreateGrant")
		narrow := strings.Contains(string(text), "kms:ViaService") || strings.Contains(string(text), `"Service"`)
		if uses && !narrow || strings.Contains(string(text), `"kms:*"`) || strings.Contains(string(text), ":root") {
			t.Errorf("direct use: %s", text)
		}
	}
}

func TestAMessageIsPutAsideAfterThreeReceives(t *testing.T) {
	each(t, func(t *testing.T, _ variant, m template) {
		t.Helper()
		for _, q := range m.resources("AWS::SQS::Queue") {
			redrive, _ := q.properties["RedrivePolicy"].(object)
			if dead := strings.HasPrefix(q.id, "IngestDead"); !dead && redrive["maxReceiveCount"] != 3.0 {
				t.Errorf("%s: %v", q.id, redrive)
			}
			if q.properties["KmsMasterKeyId"] == nil {
				t.Errorf("%s is not encrypted with our key", q.id)
			}
		}
	})
}

func TestEverythingThatCanGoWrongHasAnAlarmThatIsSent(t *testing.T) {
	each(t, func(t *testing.T, _ variant, m template) {
		t.Helper()
		got := map[string]bool{}
		for _, a := range m.resources("AWS::CloudWatch::Alarm") {
			name := strings.TrimRight(a.id, "0123456789ABCDEF")
			got[name] = true
			if len(list(a.properties["AlarmActions"])) != 1 || a.properties["AlarmDescription"] == "" || a.properties["ActionsEnabled"] != true {
				t.Errorf("%s: %v", name, a.properties)
			}
		}
		want := []string{
			"AttestationFails", "Backlog", "BacklogAge", "ControlFails", "EnclaveDown", "FilesPutAside", "HostsNotReady", "KeysRefused",
			"LeaseSteals", "NoReport", "Quarantined", "Refusals", "StoreFails",
		}
		if diff := gocmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
			t.Error(diff)
		}
	})
}

func TestTheTopicTakesWhatAlarmsAndRulesSend(t *testing.T) {
	each(t, func(t *testing.T, _ variant, m template) {
		t.Helper()
		text, err := json.Marshal(m.one(t, "AWS::SNS::TopicPolicy", "").properties["PolicyDocument"])
		if err != nil {
			t.Fatal(err)
		}
		keyPolicy, err := json.Marshal(m.one(t, "AWS::KMS::Key", "DataKey").properties["KeyPolicy"])
		if err != nil {
			t.Fatal(err)
		}
		for _, who := range []string{"cloudwatch.amazonaws.com", "events.amazonaws.com"} {
			if !strings.Contains(string(text), who) || !strings.Contains(string(keyPolicy), who) {
				t.Errorf("%s may not publish, or not encrypt what it publishes: %s", who, text)
			}
		}
	})
}

func TestWhatIsDoneToTheKeyIsTold(t *testing.T) {
	each(t, func(t *testing.T, v variant, m template) {
		t.Helper()
		changed := m.one(t, "AWS::Events::Rule", "KeyChanged")
		text, err := json.Marshal(changed.properties["EventPattern"])
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"PutKeyPolicy", "CreateGrant", "ScheduleKeyDeletion", "DisableKey", "KeyringKey"} {
			if !strings.Contains(string(text), want) {
				t.Errorf("nothing of %s in %s", want, text)
			}
		}
		used := m.one(t, "AWS::Events::Rule", "KeyUsedWithoutAttestation")
		want := object{"recipient": object{"attestationDocumentEnclaveImageDigest": []any{object{"exists": false}}}}
		if diff := gocmp.Diff(any(want), at(t, used.properties, "EventPattern", "detail", "additionalEventData")); diff != "" {
			t.Error(diff)
		}
		// Rules see no event of reading otherwise, and Decrypt is one.
		if got := used.properties["State"]; got != "ENABLED_WITH_ALL_CLOUDTRAIL_MANAGEMENT_EVENTS" {
			t.Errorf("state %v", got)
		}
		for _, r := range []resource{changed, used} {
			if len(list(r.properties["Targets"])) != 1 {
				t.Errorf("%s is told to nobody", r.id)
			}
		}
		if n := len(m.resources("AWS::CloudTrail::Trail")); (n == 1) != (v.profile == "prod") {
			t.Errorf("%d trails", n)
		}
	})
}

func TestDocumentsTakeCheckedValuesAlone(t *testing.T) {
	each(t, func(t *testing.T, _ variant, m template) {
		t.Helper()
		all := m.resources("AWS::SSM::Document")
		if len(all) != 4 {
			t.Errorf("%d documents, want 4", len(all))
		}
		for _, d := range all {
			parameters, _ := at(t, d.properties, "Content").(object)["parameters"].(object)
			script, err := json.Marshal(at(t, d.properties, "Content", "mainSteps"))
			if err != nil {
				t.Fatal(err)
			}
			for name, p := range parameters {
				pattern, _ := at(t, p, "allowedPattern").(string)
				if !strings.HasPrefix(pattern, "^") || !strings.HasSuffix(pattern, "$") || strings.ContainsAny(pattern, "'. ") {
					t.Errorf("%s of %s takes %q, and stands in quotes in a script", name, d.id, pattern)
				}
				if !strings.Contains(string(script), "'{{ "+name+" }}'") {
					t.Errorf("%s of %s is not used, or not in quotes", name, d.id)
				}
			}
		}
	})
}

func TestBeforeAnybodyGetsTheKeyNothingRuns(t *testing.T) {
	values := targettest.Values("prod", target.AMD64, targettest.Release(t, "one", target.AMD64))
	values[target.KeyAdmit] = target.AdmitNone
	m, err := synth(t, targettest.Read(t, values))
	if err != nil {
		t.Fatal(err)
	}
	group := m.one(t, "AWS::AutoScaling::AutoScalingGroup", "").properties
	if group["MinSize"] != "0" || group["MaxSize"] != "0" || group["HealthCheckType"] == "ELB" {
		t.Errorf("%v to %v instances, health by %v", group["MinSize"], group["MaxSize"], group["HealthCheckType"])
	}
}

func TestWhileKeysAreMadeNoHostIsReplacedForNotBeingReady(t *testing.T) {
	values := targettest.Values("prod", target.AMD64, targettest.Release(t, "one", target.AMD64))
	values[target.KeyKeyring] = target.KeyringCreate
	m, err := synth(t, targettest.Read(t, values))
	if err != nil {
		t.Fatal(err)
	}
	if got := m.one(t, "AWS::AutoScaling::AutoScalingGroup", "").properties["HealthCheckType"]; got == "ELB" {
		t.Errorf("health by %v", got)
	}
	m.one(t, "AWS::IAM::Policy", "KeyringTables")
	if n := len(running(t, variant{"prod", target.AMD64}).resources("AWS::IAM::Policy")); n >= len(m.resources("AWS::IAM::Policy")) {
		t.Error("the rights stay after the keys are made")
	}
}

func TestUserDataIsShortEnough(t *testing.T) {
	each(t, func(t *testing.T, _ variant, m template) {
		t.Helper()
		data, err := json.Marshal(at(t, m.one(t, "AWS::EC2::LaunchTemplate", "").properties, "LaunchTemplateData", "UserData"))
		if err != nil {
			t.Fatal(err)
		}
		// EC2 takes 16 KiB; a real release has some more files than those of the test.
		if len(data) > 12<<10 {
			t.Errorf("%d bytes", len(data))
		}
	})
}
