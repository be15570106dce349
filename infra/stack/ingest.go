package stack

import (
	"fmt"
	"path/filepath"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awskms"
	"github.com/aws/aws-cdk-go/awscdk/v2/awslambda"
	"github.com/aws/aws-cdk-go/awscdk/v2/awslambdaeventsources"
	"github.com/aws/aws-cdk-go/awscdk/v2/awss3"
	"github.com/aws/aws-cdk-go/awscdk/v2/awssqs"

	"github.com/keyhold/keyhold/infra/target"
)

const (
	ingestMinutes = 15 // the longest that Lambda has; a file that needs more is cut up
	ingestMiB     = 1024
	spoolMiB      = 4096 // the validated input is kept on disk until all of it is good
	receives      = 3    // then a message is put aside
)

// intake imports what is put below incoming/ in the archive bucket. The queue
// between them keeps a file until it is imported, and puts it aside where it cannot
// be.
func (b *build) intake() {
	// As a stranger, so that CDK adds nothing to its policy: the bucket is encrypted
	// with the same key, and each would wait for the other. The statement for S3
	// stands in keys.go.
	key := awskms.Key_FromKeyArn(b.stack, str("QueueKey"), b.dataKey.KeyArn())
	b.dead = awssqs.NewQueue(b.stack, str("IngestDeadLetters"), &awssqs.QueueProps{
		QueueName: str(b.t.Name() + "-ingest-dead"), EncryptionMasterKey: key, EnforceSSL: yes,
		RetentionPeriod: awscdk.Duration_Days(num(14)), RemovalPolicy: b.removal(),
	})
	b.queue = awssqs.NewQueue(b.stack, str("Ingest"), &awssqs.QueueProps{
		QueueName: str(b.t.Name() + "-ingest"), EncryptionMasterKey: key, EnforceSSL: yes, RemovalPolicy: b.removal(),
		VisibilityTimeout: awscdk.Duration_Minutes(num(6 * ingestMinutes)), // six times the function's, as Lambda's guide says
		DeadLetterQueue:   &awssqs.DeadLetterQueue{Queue: b.dead, MaxReceiveCount: num(receives)},
	})
	b.announce()

	b.ingest = b.function("IngestFunction", target.IngestFile, &awslambda.FunctionProps{
		Description: str("Imports records that were put below incoming/"),
		Timeout:     awscdk.Duration_Minutes(num(ingestMinutes)), MemorySize: num(ingestMiB), EphemeralStorageSize: awscdk.Size_Mebibytes(num(spoolMiB)),
		Environment: &map[string]*string{
			"KEYHOLD_TABLE_PREFIX": str(b.t.TablePrefix()), "KEYHOLD_BUCKET": b.archive.BucketName(),
		},
	})
	b.ingest.AddEventSource(awslambdaeventsources.NewSqsEventSource(b.queue, &awslambdaeventsources.SqsEventSourceProps{
		BatchSize: num(1), MaxConcurrency: num(2),
	}))
	b.ingest.Role().AttachInlinePolicy(b.tablePolicy("IngestTables", ingestAccess()))
	b.ingest.Role().AttachInlinePolicy(awsiam.NewPolicy(b.stack, str("IngestFiles"), &awsiam.PolicyProps{Statements: &[]awsiam.PolicyStatement{
		allow([]string{"s3:GetObject", "s3:GetObjectVersion"}, b.archive.ArnForObjects(str("incoming/*"))),
	}}))
	b.dataKey.Grant(b.ingest, *strs("kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey")...)
}

// announce lets the bucket tell the queue of files. Without the construct of a
// higher level, which does so by a function of its own with rights over all buckets.
func (b *build) announce() {
	allowed := b.queue.AddToResourcePolicy(awsiam.NewPolicyStatement(&awsiam.PolicyStatementProps{
		Principals: &[]awsiam.IPrincipal{awsiam.NewServicePrincipal(str("s3.amazonaws.com"), nil)},
		Actions:    strs("sqs:SendMessage"), Resources: &[]*string{b.queue.QueueArn()},
		Conditions: &map[string]any{
			"StringEquals": map[string]any{"aws:SourceAccount": b.t.Account},
			"ArnLike":      map[string]any{"aws:SourceArn": fmt.Sprintf("arn:%s:s3:::%s-*", b.t.Partition(), b.t.Name())},
		},
	}))
	bucket := b.archive.Node().DefaultChild().(awss3.CfnBucket) //nolint:errcheck,forcetypeassert // an L2 bucket has this child
	bucket.SetNotificationConfiguration(&awss3.CfnBucket_NotificationConfigurationProperty{
		QueueConfigurations: []any{&awss3.CfnBucket_QueueConfigurationProperty{
			Event: str("s3:ObjectCreated:*"), Queue: b.queue.QueueArn(),
			Filter: &awss3.CfnBucket_NotificationFilterProperty{S3Key: &awss3.CfnBucket_S3KeyFilterProperty{Rules: []any{
				&awss3.CfnBucket_FilterRuleProperty{Name: str("prefix"), Value: str("incoming/")},
				&awss3.CfnBucket_FilterRuleProperty{Name: str("suffix"), Value: str(".jsonl")},
			}}},
		}},
	})
	// S3 tries it out when it is told.
	b.archive.Node().AddDependency(allowed.PolicyDependable)
}

// ingestAccess is what an import needs.
func ingestAccess() []access {
	const get, put, update, query, check = "GetItem", "PutItem", "UpdateItem", "Query", "ConditionCheckItem"
	return []access{
		{"batches", []string{get, put}, []string{query}},
		{"imports", []string{get, put, update, check}, nil},
		{"leases", []string{get}, []string{query}},
		{"records", []string{put}, nil},
		{"sealed_keys", []string{get}, nil},
		{"segments", []string{get, put}, nil},
	}
}

// function makes one of the programs below lambda/ of the release, outside of the
// network: they talk to AWS's APIs alone, and to none that is only in there.
func (b *build) function(id, file string, props *awslambda.FunctionProps) awslambda.Function {
	folder := filepath.Dir(filepath.Join(b.t.Release.Dir, filepath.FromSlash(file)))
	props.Runtime, props.Architecture, props.Handler = awslambda.Runtime_PROVIDED_AL2023(), awslambda.Architecture_ARM_64(), str("bootstrap")
	props.Code = awslambda.Code_FromAsset(str(folder), nil)
	logs := b.logGroup(id + "Logs")
	props.LogGroup = logs
	role := awsiam.NewRole(b.stack, str(id+"Role"), &awsiam.RoleProps{AssumedBy: awsiam.NewServicePrincipal(str("lambda.amazonaws.com"), nil)})
	logs.GrantWrite(role)
	props.Role = role
	props.LoggingFormat = awslambda.LoggingFormat_TEXT // the programs write JSON themselves, and metrics among it
	return awslambda.NewFunction(b.stack, str(id), props)
}
