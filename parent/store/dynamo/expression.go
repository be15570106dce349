package dynamo

import (
	"maps"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// when is a condition with its placeholders.
type when struct {
	expression string
	values     item
}

// same is the condition that the named attributes are as in m: there with the
// same value, or absent from both.
func same(m item, names ...string) when {
	w := when{values: item{}}
	var terms []string
	for _, name := range names {
		v, there := m[name]
		if !there {
			terms = append(terms, "attribute_not_exists("+name+")")
			continue
		}
		w.values[":is_"+name] = v
		terms = append(terms, name+" = :is_"+name)
	}
	w.expression = strings.Join(terms, " AND ")
	return w
}

// and adds a condition without placeholders of its own.
func (w when) and(expression string) when {
	w.expression += " AND " + expression
	return w
}

// orAbsent lets the condition hold where there is no item as well.
func (w when) orAbsent(key string) when {
	w.expression = "attribute_not_exists(" + key + ") OR (" + w.expression + ")"
	return w
}

// change is an update of one item.
type change struct {
	table      string
	key        item
	expression string
	values     item
	when       when
}

// become updates an item so that the named attributes are as in after: set where
// they are in it, removed where they are not. It touches no other.
func become(table string, key, after item, w when, names ...string) change {
	c := change{table: table, key: key, when: w, values: item{}}
	var set, remove []string
	for _, name := range names {
		if v, there := after[name]; there {
			c.values[":"+name] = v
			set = append(set, name+" = :"+name)
		} else {
			remove = append(remove, name)
		}
	}
	var clauses []string
	if len(set) > 0 {
		clauses = append(clauses, "SET "+strings.Join(set, ", "))
	}
	if len(remove) > 0 {
		clauses = append(clauses, "REMOVE "+strings.Join(remove, ", "))
	}
	c.expression = strings.Join(clauses, " ")
	return c
}

// all is every placeholder; DynamoDB refuses an empty map.
func (c *change) all() item {
	all := maps.Clone(c.values)
	maps.Copy(all, c.when.values)
	if len(all) == 0 {
		return nil
	}
	return all
}

const allOld = types.ReturnValuesOnConditionCheckFailureAllOld

func (s *Store) txUpdate(c change) types.TransactWriteItem {
	return types.TransactWriteItem{Update: &types.Update{
		TableName:                           s.table(c.table),
		Key:                                 c.key,
		UpdateExpression:                    &c.expression,
		ConditionExpression:                 &c.when.expression,
		ExpressionAttributeValues:           c.all(),
		ReturnValuesOnConditionCheckFailure: allOld,
	}}
}

// txPut puts m where no item with its key is.
func (s *Store) txPut(table, key string, m item) types.TransactWriteItem {
	absent := "attribute_not_exists(" + key + ")"
	return types.TransactWriteItem{Put: &types.Put{
		TableName:                           s.table(table),
		Item:                                m,
		ConditionExpression:                 &absent,
		ReturnValuesOnConditionCheckFailure: allOld,
	}}
}

func (s *Store) txCheck(table string, key item, w when) types.TransactWriteItem {
	return types.TransactWriteItem{ConditionCheck: &types.ConditionCheck{
		TableName:                           s.table(table),
		Key:                                 key,
		ConditionExpression:                 &w.expression,
		ExpressionAttributeValues:           w.values,
		ReturnValuesOnConditionCheckFailure: allOld,
	}}
}

// txDelete deletes an item; w without expression is no condition.
func (s *Store) txDelete(table string, key item, w when) types.TransactWriteItem {
	d := &types.Delete{TableName: s.table(table), Key: key}
	if w.expression != "" {
		d.ConditionExpression = &w.expression
		d.ExpressionAttributeValues = w.values
		d.ReturnValuesOnConditionCheckFailure = allOld
	}
	return types.TransactWriteItem{Delete: d}
}
