package dynamo

import "github.com/aws/aws-sdk-go-v2/service/dynamodb"

// TestingOnlyTables lists the tables without their prefix.
func TestingOnlyTables() []string {
	var names []string
	for _, t := range schemas() {
		names = append(names, t.name)
	}
	return names
}

// TestingOnlyCreateInput is how a table is created.
func TestingOnlyCreateInput(s *Store, name string) *dynamodb.CreateTableInput {
	for _, t := range schemas() {
		if t.name == name {
			return s.createInput(t)
		}
	}
	return nil
}
