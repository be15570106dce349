package stack

import (
	_ "embed"
	"encoding/hex"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsautoscaling"
	"github.com/aws/aws-cdk-go/awscdk/v2/awscloudwatch"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsec2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awselasticloadbalancingv2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awss3assets"
	"github.com/aws/aws-cdk-go/awscdk/v2/interfaces/interfacesawscloudwatch"
	"github.com/aws/jsii-runtime-go"
)

//go:embed userdata.sh
var userData string

const (
	diskGiB       = 16
	warmSeconds   = 240 // from launch to ready: packages, bundle, boot of the enclave, its proof
	graceMinutes  = 10
	bakeMinutes   = 10 // that a refresh is watched after its last instance
	lifetimeDays  = 30 // then an instance is replaced, and with it its boot
	drainMinutes  = hookMinutes
	healthSeconds = 10
)

// fleet makes the parents: a launch template, a group over two zones, and a load
// balancer that does nothing but ask whether they are ready.
func (b *build) fleet() {
	b.group = b.t.Name() + "-parents"
	bundle := b.bundle()
	template := b.template(bundle)
	group := awsautoscaling.NewAutoScalingGroup(b.stack, str("Fleet"), &awsautoscaling.AutoScalingGroupProps{
		AutoScalingGroupName: str(b.group), Vpc: b.vpc, VpcSubnets: &awsec2.SubnetSelection{SubnetType: awsec2.SubnetType_PRIVATE_ISOLATED},
		LaunchTemplate: template, MinCapacity: num(b.instances()), MaxCapacity: num(max(b.instances(), b.most())),
		HealthChecks: b.healthChecks(), GroupMetrics: &[]awsautoscaling.GroupMetrics{awsautoscaling.GroupMetrics_All()},
		MaxInstanceLifetime: awscdk.Duration_Days(num(lifetimeDays)), DefaultInstanceWarmup: awscdk.Duration_Seconds(num(warmSeconds)),
		Notifications: &[]*awsautoscaling.NotificationConfiguration{{Topic: b.topic, ScalingEvents: awsautoscaling.ScalingEvents_ERRORS()}},
		UpdatePolicy: awsautoscaling.UpdatePolicy_InstanceRefresh(&awsautoscaling.InstanceRefreshOptions{
			Strategy:             awsautoscaling.InstanceRefreshStrategy_ROLLING,
			MinHealthyPercentage: num(100), MaxHealthyPercentage: num(150), SkipMatching: yes,
			InstanceWarmup: awscdk.Duration_Seconds(num(warmSeconds)), BakeTime: awscdk.Duration_Minutes(num(bakeMinutes)),
			Alarms: references(b.rollback),
		}),
	})
	group.AddLifecycleHook(str("Drain"), &awsautoscaling.BasicLifecycleHookProps{
		LifecycleTransition: awsautoscaling.LifecycleTransition_INSTANCE_TERMINATING, LifecycleHookName: str("drain"),
		HeartbeatTimeout: awscdk.Duration_Minutes(num(drainMinutes)), DefaultResult: awsautoscaling.DefaultResult_CONTINUE,
	})
	b.balancer(group)
	b.hostRights()
}

// instances is none while nobody gets the key: they could not become ready.
func (b *build) instances() int {
	if b.t.Idle() {
		return 0
	}
	return b.t.Profile.Min
}

func (b *build) most() int {
	if b.t.Idle() {
		return 0
	}
	return b.t.Profile.Max
}

// healthChecks ask the load balancer too, once there can be a keyring: without one
// no parent is ready, and all would be replaced for ever.
func (b *build) healthChecks() awsautoscaling.HealthChecks {
	grace := awscdk.Duration_Minutes(num(graceMinutes))
	if b.t.Creating || b.t.Idle() {
		return awsautoscaling.HealthChecks_Ec2(&awsautoscaling.Ec2HealthChecksOptions{GracePeriod: grace})
	}
	return awsautoscaling.HealthChecks_WithAdditionalChecks(&awsautoscaling.AdditionalHealthChecksOptions{
		GracePeriod: grace, AdditionalTypes: &[]awsautoscaling.AdditionalHealthCheckType{awsautoscaling.AdditionalHealthCheckType_ELB},
	})
}

// bundle is the release without what hosts do not need.
func (b *build) bundle() awss3assets.Asset {
	asset := awss3assets.NewAsset(b.stack, str("Bundle"), &awss3assets.AssetProps{Path: str(b.t.Release.Dir), Exclude: strs("lambda", "lambda/**")})
	b.role.AddToPrincipalPolicy(allow([]string{"s3:GetObject"}, str(fmt.Sprintf("arn:%s:s3:::%s/%s", b.t.Partition(), *asset.S3BucketName(), *asset.S3ObjectKey()))))
	return asset
}

func (b *build) template(bundle awss3assets.Asset) awsec2.LaunchTemplate {
	return awsec2.NewLaunchTemplate(b.stack, str("Parent"), &awsec2.LaunchTemplateProps{
		InstanceType: awsec2.NewInstanceType(str(b.t.Instance.Name)), NitroEnclaveEnabled: yes,
		// One image by its id: an alias would move under a deployment that is about
		// something else, and a refresh cannot be rolled back to an alias.
		MachineImage:  awsec2.MachineImage_GenericLinux(&map[string]*string{b.t.Region: str(b.t.AMI)}, nil),
		RequireImdsv2: yes, HttpPutResponseHopLimit: num(1), HttpEndpoint: yes, InstanceMetadataTags: no, DetailedMonitoring: yes,
		Role: b.role, SecurityGroup: b.hosts, UserData: awsec2.UserData_Custom(str(b.userData(bundle))), AssociatePublicIpAddress: no,
		BlockDevices: &[]*awsec2.BlockDevice{{DeviceName: str("/dev/xvda"), Volume: awsec2.BlockDeviceVolume_Ebs(num(diskGiB), &awsec2.EbsDeviceOptions{
			Encrypted: yes, VolumeType: awsec2.EbsDeviceVolumeType_GP3, DeleteOnTermination: yes,
		})}},
	})
}

// userData is the values of this deployment, and then the script. The values hold
// no quote: target checked what people gave, the rest are names and digests.
func (b *build) userData(bundle awss3assets.Asset) string {
	var sums []string
	for _, f := range b.t.Release.Files {
		sums = append(sums, hex.EncodeToString(f.Sum[:])+"  "+path.Clean(f.Path))
	}
	logs := b.logGroup("HostLogs")
	logs.GrantWrite(b.role)
	var text strings.Builder
	text.WriteString("#!/bin/bash\nset -euo pipefail\n")
	for _, v := range []struct{ name, value string }{
		{"STACK", b.t.Name()},
		{"REGION", b.t.Region},
		{"BUNDLE", *bundle.S3ObjectUrl()},
		{"PCR0", b.t.Release.PCR0.String()},
		{"MEMORY_MIB", strconv.Itoa(b.t.Instance.EnclaveMiB)},
		{"CPU_COUNT", strconv.Itoa(b.t.Instance.EnclaveCPUs)},
		{"TABLE_PREFIX", b.t.TablePrefix()},
		{"ROLE", b.t.ParentRole()},
		{"LOGS", *logs.LogGroupName()},
		{"SUMS", strings.Join(sums, "\n")},
	} {
		text.WriteString("KEYHOLD_" + v.name + "='" + v.value + "'\n")
	}
	text.WriteString("\n" + userData)
	return text.String()
}

func (b *build) balancer(group awsautoscaling.AutoScalingGroup) {
	balancer := awselasticloadbalancingv2.NewNetworkLoadBalancer(b.stack, str("Health"), &awselasticloadbalancingv2.NetworkLoadBalancerProps{
		Vpc: b.vpc, InternetFacing: no, CrossZoneEnabled: no, DeletionProtection: jsii.Bool(b.t.Profile.Keep),
		VpcSubnets:     &awsec2.SubnetSelection{SubnetType: awsec2.SubnetType_PRIVATE_ISOLATED},
		SecurityGroups: &[]awsec2.ISecurityGroup{b.health},
	})
	listener := balancer.AddListener(str("Ready"), &awselasticloadbalancingv2.BaseNetworkListenerProps{
		Port: num(readyPort), Protocol: awselasticloadbalancingv2.Protocol_TCP,
	})
	targets := listener.AddTargets(str("Parents"), &awselasticloadbalancingv2.AddNetworkTargetsProps{
		Port: num(readyPort), Protocol: awselasticloadbalancingv2.Protocol_TCP,
		Targets:             &[]awselasticloadbalancingv2.INetworkLoadBalancerTarget{group},
		DeregistrationDelay: awscdk.Duration_Seconds(num(0)),
		HealthCheck: &awselasticloadbalancingv2.HealthCheck{
			Protocol: awselasticloadbalancingv2.Protocol_HTTP, Path: str("/readyz"), HealthyHttpCodes: str("200"),
			Interval: awscdk.Duration_Seconds(num(healthSeconds)), Timeout: awscdk.Duration_Seconds(num(healthSeconds / 2)),
			HealthyThresholdCount: num(2), UnhealthyThresholdCount: num(3),
		},
	})
	b.ready = targets
}

// hostRights are those beside tables and keys: being a managed instance, so that
// documents can be run on it, and saying how it is.
func (b *build) hostRights() {
	b.role.AddToPrincipalPolicy(allow([]string{
		"ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel",
		"ssmmessages:OpenControlChannel", "ssmmessages:OpenDataChannel",
	}, str("*")))
	b.role.AddToPrincipalPolicy(allowIf("StringEquals", map[string]any{"cloudwatch:namespace": metricNamespace}, []string{"cloudwatch:PutMetricData"}, str("*")))
}

func references(alarms []awscloudwatch.Alarm) *[]interfacesawscloudwatch.IAlarmRef {
	out := make([]interfacesawscloudwatch.IAlarmRef, 0, len(alarms))
	for _, a := range alarms {
		out = append(out, a)
	}
	return &out
}
