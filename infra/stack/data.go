package stack

import (
	"fmt"

	"github.com/aws/aws-cdk-go/awscdk/v2"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsdynamodb"
	"github.com/aws/aws-cdk-go/awscdk/v2/awsiam"
	"github.com/aws/aws-cdk-go/awscdk/v2/awss3"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/jsii-runtime-go"
	"github.com/keyhold/keyhold/parent/store/dynamo"
)

// data makes the tables as the store would, and the buckets. Nothing in a table
// ends by itself: what was signed, and its proof, is kept.
func (b *build) data() {
	for _, in := range dynamo.Tables(b.t.TablePrefix()) {
		b.tables = append(b.tables, b.table(in))
	}
	b.buckets()
	b.role.AttachInlinePolicy(b.tablePolicy("ParentTables", parentAccess()))
	if b.t.Creating {
		b.role.AttachInlinePolicy(b.tablePolicy("KeyringTables", creatorAccess()))
	}
	b.operators()
	b.dataKey.Grant(b.role, *strs("kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey")...)
}

// table repeats nothing of the store's layout. It is the older construct of the
// two: the newer one cannot have a key of one's own in every kind of stack.
func (b *build) table(in *dynamodb.CreateTableInput) table {
	kinds := map[string]types.ScalarAttributeType{}
	for _, a := range in.AttributeDefinitions {
		kinds[aws.ToString(a.AttributeName)] = a.AttributeType
	}
	key := func(schema []types.KeySchemaElement) (hash, sort *awsdynamodb.Attribute) {
		for _, e := range schema {
			a := &awsdynamodb.Attribute{Name: e.AttributeName, Type: attributeType(kinds[*e.AttributeName])}
			if e.KeyType == types.KeyTypeHash {
				hash = a
			} else {
				sort = a
			}
		}
		return hash, sort
	}
	name := aws.ToString(in.TableName)[len(b.t.TablePrefix()):]
	hash, sort := key(in.KeySchema)
	t := awsdynamodb.NewTable(b.stack, str("Table-"+name), &awsdynamodb.TableProps{
		TableName: in.TableName, PartitionKey: hash, SortKey: sort, BillingMode: awsdynamodb.BillingMode_PAY_PER_REQUEST,
		Encryption: awsdynamodb.TableEncryption_CUSTOMER_MANAGED, EncryptionKey: b.dataKey,
		PointInTimeRecoverySpecification: &awsdynamodb.PointInTimeRecoverySpecification{PointInTimeRecoveryEnabled: yes},
		DeletionProtection:               jsii.Bool(b.t.Profile.Keep), RemovalPolicy: b.removal(),
	})
	for _, g := range in.GlobalSecondaryIndexes {
		hash, sort := key(g.KeySchema)
		props := &awsdynamodb.GlobalSecondaryIndexProps{IndexName: g.IndexName, PartitionKey: hash, SortKey: sort, ProjectionType: awsdynamodb.ProjectionType_KEYS_ONLY}
		if g.Projection.ProjectionType == types.ProjectionTypeInclude {
			props.ProjectionType, props.NonKeyAttributes = awsdynamodb.ProjectionType_INCLUDE, strs(g.Projection.NonKeyAttributes...)
		}
		t.AddGlobalSecondaryIndex(props)
	}
	return table{name, t}
}

func attributeType(k types.ScalarAttributeType) awsdynamodb.AttributeType {
	switch k {
	case types.ScalarAttributeTypeS:
		return awsdynamodb.AttributeType_STRING
	case types.ScalarAttributeTypeN:
		return awsdynamodb.AttributeType_NUMBER
	case types.ScalarAttributeTypeB:
		return awsdynamodb.AttributeType_BINARY
	}
	panic(fmt.Sprintf("a key attribute of type %q", k))
}

func (b *build) buckets() {
	bucket := func(id string, props *awss3.BucketProps) awss3.Bucket {
		props.BlockPublicAccess, props.EnforceSSL = awss3.BlockPublicAccess_BLOCK_ALL(), yes
		props.ObjectOwnership, props.RemovalPolicy = awss3.ObjectOwnership_BUCKET_OWNER_ENFORCED, b.removal()
		return awss3.NewBucket(b.stack, str(id), props)
	}
	// The log service cannot use a key of one's own.
	b.logs = bucket("LogBucket", &awss3.BucketProps{
		Encryption:     awss3.BucketEncryption_S3_MANAGED,
		LifecycleRules: &[]*awss3.LifecycleRule{{Expiration: awscdk.Duration_Days(num(365))}},
	})
	b.archive = bucket("Archive", &awss3.BucketProps{
		Encryption: awss3.BucketEncryption_KMS, EncryptionKey: b.dataKey, BucketKeyEnabled: yes, Versioned: yes,
		ServerAccessLogsBucket: b.logs, ServerAccessLogsPrefix: str("archive/"),
	})
}

// access is what a role may do with a table and with its index.
type access struct {
	table   string
	actions []string
	index   []string
}

// parentAccess is what the parent needs: it makes no import, no record, no keyring
// and no sealed key, and deletes nothing. A test compares it with the requests
// that the store makes for the methods which cmd/parent can reach.
func parentAccess() []access {
	const get, put, update, query, scan, look = "GetItem", "PutItem", "UpdateItem", "Query", "Scan", "DescribeTable"
	return []access{
		{"batches", []string{look, get, update}, []string{query}},
		{"boots", []string{look, put}, nil},
		{"imports", []string{look}, nil},
		{"keyrings", []string{look, get}, nil},
		{"leases", []string{look, get, update}, []string{query}},
		{"receipts", []string{look, put}, nil},
		{"records", []string{look}, nil},
		{"sealed_keys", []string{look, get, scan}, nil},
		{"segments", []string{look, get, put}, nil},
	}
}

// creatorAccess is what keyhold keyring create needs beside it, while keyrings and
// keys are made.
func creatorAccess() []access {
	return []access{
		{"keyrings", []string{"PutItem"}, nil},
		{"leases", []string{"PutItem"}, nil},
		{"sealed_keys", []string{"PutItem"}, nil},
	}
}

// operatorAccess is what the tool of operators needs but for making tables and
// keys: imports, their abort, exports, and putting a batch back.
func operatorAccess() []access {
	const get, put, update, remove = "GetItem", "PutItem", "UpdateItem", "DeleteItem"
	const query, scan, check, look = "Query", "Scan", "ConditionCheckItem", "DescribeTable"
	return []access{
		{"batches", []string{look, get, put, update, remove}, []string{query}},
		{"boots", []string{look, put, scan}, nil},
		{"imports", []string{look, get, put, update, scan, check}, nil},
		{"keyrings", []string{look, get}, nil},
		{"leases", []string{look, get}, []string{query}},
		{"receipts", []string{look, get, put, query}, nil},
		{"records", []string{look, put}, nil},
		{"sealed_keys", []string{look, get, scan}, nil},
		{"segments", []string{look, get, put, remove}, nil},
	}
}

// operators makes a policy to be attached to roles of people. The stack attaches it
// to nobody: who may submit records decides what gets signed.
func (b *build) operators() {
	awsiam.NewManagedPolicy(b.stack, str("OperatorPolicy"), &awsiam.ManagedPolicyProps{
		ManagedPolicyName: str(b.t.Name() + "-operator"), Description: str("Import, export and watch records of " + b.t.Name()),
		Statements: b.statements(operatorAccess()),
	})
}

// tablePolicy says for each table what may be done with it.
func (b *build) tablePolicy(id string, may []access) awsiam.Policy {
	return awsiam.NewPolicy(b.stack, str(id), &awsiam.PolicyProps{Statements: b.statements(may)})
}

func (b *build) statements(may []access) *[]awsiam.PolicyStatement {
	var statements []awsiam.PolicyStatement
	for _, a := range may {
		arn := b.arn("dynamodb", "table/"+b.t.TablePrefix()+a.table)
		statements = append(statements, allow(named("dynamodb", a.actions), str(arn)))
		if a.index != nil {
			statements = append(statements, allow(named("dynamodb", a.index), str(arn+"/index/"+indexOf(a.table))))
		}
	}
	return &statements
}

// indexOf is the name of the one index of a table.
func indexOf(of string) string {
	for _, in := range dynamo.Tables("") {
		if aws.ToString(in.TableName) == of && len(in.GlobalSecondaryIndexes) == 1 {
			return aws.ToString(in.GlobalSecondaryIndexes[0].IndexName)
		}
	}
	panic("table " + of + " has no index")
}

func named(service string, actions []string) []string {
	var out []string
	for _, a := range actions {
		out = append(out, service+":"+a)
	}
	return out
}
