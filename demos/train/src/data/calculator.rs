//! Requests for arithmetic.

use crate::data::grammar::{Form, Slots, expand, forms};
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

// The expression has the numbers in the order of the request wherever that is possible: writing it is copying.
forms! {
    SUM {
        train: [
            "<noun>{a} plus {b}", "<do>add {a} and {b}", "<do>add {a} to {b}", "{a} plus {b}", "{a} + {b}", "<noun>{a} + {b}", "how much is {a} [plus|+] {b}", "how much [are|is] {a} and {b} [together|in all|]",
            "<noun>the sum of {a} and {b}", "<do>[compute|calculate] {a} [+|plus] {b}", "<do>calculate the sum of {a} and {b}", "<do>[work|figure] out {a} plus {b}", "<know>what {a} and {b} make",
            "what do {a} and {b} [make|give|add up to|come to]", "<do>put {a} and {b} together[, what is the total|]", "{a} and {b} added, [how much is that|what is that]", "<do>sum {a} and {b}", "<noun>the total of {a} and {b}",
            "{a} and {b}, what is the sum", "sum of {a} and {b}", "if I add {a} [and|to] {b}, what do I get", "what do I get when I add {a} [and|to] {b}", "I [have|got] {a} and {b} to add", "[plus|add]: {a} and {b}",
            "start with {a} and add {b}", "how much does {a} plus {b} make", "I need to add {a} and {b}, what comes out", "the result of {a} + {b}[, please|]", "[numbers|here are two numbers]: {a} and {b}. Add them", "{a} more than {b} is how much",
        ],
        held: [
            "what is the sum of {a} and {b}", "how much do {a} and {b} make", "tell me what {a} plus {b} is", "calculate {a} + {b}", "total of {a} and {b}", "add up the two numbers {a} and {b}",
            "what comes out when I put {a} and {b} together",
        ],
    }
    DIFFERENCE {
        train: [
            "<noun>{a} minus {b}", "{a} minus {b}", "{a} - {b}", "<noun>{a} - {b}", "how much is {a} [less|minus|-] {b}", "<know>what is left of {a} without {b}", "what is left of {a} [without|less] {b}",
            "<do>[compute|calculate] {a} [-|minus] {b}", "<do>calculate {a} less {b}", "start with {a} and take [away|off] {b}", "{a} take away {b}", "from {a} take [away |]{b}", "from {a}, subtract {b}",
            "if I have {a} and subtract {b}, what is left", "<noun>{a} less {b}", "<noun>the difference between {a} and {b}", "what is the difference [of|between] {a} and {b}", "{a} without {b}[, how much is that|]",
            "how much remains of {a} if {b} [goes|are taken|is taken] [away|off]", "what do I get when I take from {a} the number {b}", "{a} reduced by {b}", "<do>reduce {a} by {b}", "<do>lower {a} by {b}", "how much is left of {a} after {b} [is|are] gone",
            "[minus|less]: {a} and {b}", "{a}, minus {b}, how much is it", "the result of {a} - {b}[, please|]",
        ],
        held: ["how much is {a} minus {b} then", "what is {a} - {b}", "what is left when I have {a} and take away {b}", "work out {a} minus {b}", "how much is left if I take {a} and subtract {b}"],
    }
    FROM {
        train: [
            "<do>subtract {b} from {a}", "<do>take {b} [away |off |]from {a}", "<do>deduct {b} from {a}", "[subtracting|taking] {b} from {a} [gives|leaves] what", "how much is left when {b} is taken [away |]from {a}",
            "what do I get when I subtract {b} from {a}", "{b} [taken|subtracted] from {a}", "if {b} is subtracted from {a}, [what is left|how much is left|what remains]", "<noun>{b} subtracted from {a}", "how much more than {b} is {a}",
        ],
        held: ["what is left when I take {b} from {a}", "what do I have left when I take {b} away from {a}", "how much is it when I subtract {b} from {a}", "tell me how much more {a} is than {b}"],
    }
    PRODUCT {
        train: [
            "<noun>{a} times {b}", "<do>multiply {a} [by|with|and] {b}", "{a} times {b}", "{a} * {b}", "{a} x {b}", "<noun>{a} [*|x] {b}", "how much is {a} [multiplied by|x|*] {b}", "<noun>the product of {a} and {b}",
            "<do>[compute|calculate] {a} [*|x|times] {b}", "<know>what {a} times {b} is", "what do I get when I multiply {a} [by|and|with] {b}", "{a} multiplied by {b}", "if I multiply {a} by {b}, what [comes out|do I get]",
            "{a} [by|multiplied with] {b}, how much is [that|it]", "product of {a} and {b}", "what do {a} and {b} make when [I multiply them|multiplied]", "[multiply|times]: {a} and {b}", "how much are {a} times {b}", "take {a} {b} times",
            "here are two numbers: {a} and {b}. Multiply them", "{a} and {b} multiplied", "what does {a} times {b} [give|make|come to]", "the result of {a} * {b}[, please|]", "[work|figure] out {a} [times|x] {b}",
        ],
        held: ["how much is {a} times {b}", "what is the product of {a} and {b}", "work out {a} * {b}", "what is {a} multiplied by {b}", "what comes out when I multiply the numbers {a} and {b}"],
    }
    QUOTIENT {
        train: [
            "<noun>{a} divided by {b}", "<do>divide {a} by {b}", "{a} divided by {b}", "{a} / {b}", "<noun>{a} / {b}", "<do>[compute|calculate] {a} [/|over|divided by] {b}", "<do>[split|share] {a} into {b} equal parts[, how much is each|]",
            "how much is {a} [over|/] {b}", "<know>what {a} divided by {b} is", "if I divide {a} by {b}, what [comes out|do I get]", "{a} over {b}", "what does {a} divided by {b} [give|make]", "<noun>the quotient of {a} and {b}",
            "<do>[split|share|divide] {a} [between|among] {b} people[, what does each get|]", "{a} [shared|split] by {b}, how much is each", "how much does each get when {a} is shared by {b}", "{a} in {b} equal parts, how much is one",
            "[divide|divided]: {a} by {b}", "{a} [for|among] {b} people, how much for each", "the result of {a} / {b}[, please|]", "<do>divide the number {a} by {b}", "what is one part when {a} is split into {b}",
        ],
        held: ["how much is {a} divided by {b}", "what is {a} / {b}", "work out {a} divided by {b}", "what do I get when I divide {a} by {b}", "share {a} among {b} people, how much does each get"],
    }
    GOES_INTO {
        train: ["how many times does {b} go into {a}", "how often [does {b} fit|is {b} contained] in {a}", "how many times is {b} in {a}", "<know>how many times {b} [fits|goes] into {a}", "how many {b}s are [there |]in {a}", "how often does {b} go into {a}"],
        held: ["how many times does {b} fit into {a}", "tell me how often {b} goes into {a}", "do you know how often {b} is in {a}", "how many times can I take {b} from {a}"],
    }
    PERCENT {
        train: [
            "<noun>{a}[%| %| percent] of {b}", "{a}[%| %| percent] of {b}", "how much is {a}% of {b}", "<do>[compute|calculate] {a}[%| percent] of {b}", "<do>take {a}[%| percent| %] of {b}", "what does {a}[%| percent] of {b} [make|come to]",
            "{a}[%| percent] from {b}[, how much is that|]", "<know>how much {a}[%| percent] of {b} is", "how many are {a}[%| percent] of {b}", "a tip of {a}[%| percent] on {b}, how much is [that|it]", "{a}[%| percent] tax on {b}, how much is [that|it]",
            "how much is a [discount|tax|tip] of {a}[%| percent] on {b}", "what is {a}[%| %] of {b}", "[work|figure] out {a} [percent|%] of {b}", "if I take {a}[%| percent] of {b}, how much is it", "{a} [percent|%] of {b} is how much", "what is {a} percent of {b} [euros|dollars]",
            "I pay {a}[%| percent] of {b}, how much is that", "[percent|percentage]: {a} of {b}", "<noun>{a}[%| percent] of the number {b}", "<noun>a share of {a}[%| percent] in {b}",
        ],
        held: ["what would {a}% of {b} be", "how much is {a} percent of {b}", "work out {a}% of {b}", "how much do I get if I take {a} percent of {b}", "what is a share of {a}% of {b}"],
    }
    OF_PERCENT {
        train: ["of {b}, how much is {a}[%| percent]", "from {b} take {a}[%| percent]", "{b}: how much is {a}[%| percent] of it", "I have {b} and {who} gets {a}[%| percent], how much is that", "what of {b} is {a}[%| percent]", "{b} at {a}[%| percent], how much is that", "I have {b} and [give|lose|spend|sell] {a}[%| percent] of [it|that], how much is that", "{b}, and {who} wants {a}[%| percent] of it, how much is that", "{b} and {a}[%| percent] of [it|that]", "{b}, a [part|piece] of {a}[%| percent], how much is [it|that]", "of {b} a share of {a}[%| percent], how much is [it|that]", "my share of {b} is {a}[%| percent], how much is [it|that]", "there are {b} and {a}[%| percent] of them are gone, how many is that", "I get {b} and owe {who} {a}[%| percent] of it, how much is it"],
        held: ["of {b}, what is {a} percent", "I have {b} and pay {a}% of it, how much is that", "{b} and a share of {a}%, how much is it", "if I have {b}, how much is {a} percent of it"],
    }
    PERCENT_MORE {
        train: [
            "{b} plus {a}[%| percent]", "<do>[increase|raise] {b} by {a}[%| percent]", "<do>add {a}[%| percent] to {b}", "{b} and {a}[%| percent] more, how much is that", "what is {b} plus {a}[%| percent] [tax|tip|]", "{b} with {a}[%| percent] on top",
            "a {x} costs {b}, and {a}[%| percent] tax comes on top, what do I pay", "how much is {b} after a raise of {a}[%| percent]", "what do I pay for {b} with a tip of {a}[%| percent]", "{b} grows by {a}[%| percent], how much is it then",
        ],
        held: ["how much is {b} plus {a}%", "what is {b} with {a} percent more", "I pay {b} and {a}% on top, how much is that", "raise the number {b} by {a} percent", "what do I pay for {b} with {a}% tax on top"],
    }
    PERCENT_LESS {
        train: [
            "{b} minus {a}[%| percent]", "<do>[reduce|lower|cut] {b} by {a}[%| percent]", "<do>take {a}[%| percent] off {b}", "{b} less {a}[%| percent], how much is that", "{b} with a discount of {a}[%| percent]", "{b} with {a}[%| percent] off",
            "a {x} costs {b}, and there is a discount of {a}[%| percent], what do I pay", "what is left of {b} after {a}[%| percent] [tax|are gone]", "{b} falls by {a}[%| percent], how much is it then", "the price was {b}, now {a}[%| percent] off, what is it",
        ],
        held: ["how much is {b} minus {a}%", "what is {b} with {a} percent off", "there is a discount of {a}% on {b}, what do I pay", "what is {b} reduced by {a} percent", "take the price {b} and lower it by {a}%"],
    }
    SQUARE {
        train: [
            "<noun>{a} squared", "{a} squared", "the square of {a}", "<noun>the square of {a}", "<do>multiply {a} by itself", "<do>compute the square of {a}", "<noun>{a} times itself", "<do>raise {a} to the power of [two|2]", "<do>square {a}", "how much is the square of {a}",
            "{a} to the power of [two|2]", "{a} ^ 2", "{a} times itself, how much is that", "what do I get when I square {a}", "the area of a square with sides of {a}", "<know>what {a} squared is", "square the number {a}",
        ],
        held: ["what is the square of the number {a}", "how much is {a} squared", "what is {a} times itself then", "what do I get when I multiply {a} by itself", "how much is {a} raised to the power of two"],
    }
    POWER {
        train: [
            "<noun>{a} to the power of {b}", "{a} to the power of {b}", "{a} ^ {b}", "<do>raise {a} to the power [of |]{b}", "{a} to the power {b}", "how much is {a} to the power of {b}", "<do>[compute|calculate] {a} ^ {b}", "what do I get when I raise {a} to the power {b}",
            "<know>what {a} to the power of {b} is", "{a} raised to {b}",
        ],
        held: ["what is {a} raised to the power of {b}", "work out {a} ^ {b}", "how much is {a} raised to {b}", "tell me the value of {a} to the power of {b}"],
    }
    ROOT {
        train: [
            "<noun>the [square |]root of {a}", "square root of {a}", "the root of {a}", "<do>[compute|calculate] the [square |]root of {a}", "which number squared is {a}", "<do>take the [square |]root of {a}", "how much is the [square |]root of {a}", "root of {a}",
            "sqrt({a})", "<know>what the square root of {a} is", "what number times itself [is|makes|gives] {a}", "the number whose square is {a}", "sqrt of {a}", "which number do I have to square to get {a}", "[work|figure] out the square root of {a}",
        ],
        held: ["how much is the square root of the number {a}", "what is the root of the number {a}", "what number squared gives {a}", "which number times itself is {a}"],
    }
    REST {
        train: [
            "<noun>the remainder of {a} divided by {b}", "{a} mod {b}", "what remains when {a} is divided by {b}", "<do>divide {a} by {b} and give me the remainder", "<do>[compute|calculate] {a} modulo {b}", "<noun>{a} mod {b}", "{a} modulo {b}",
            "the remainder when {a} is divided by {b}", "if I divide {a} by {b}, what [is the remainder|remains]", "how much remains of {a} divided by {b}", "{a} divided by {b}, what is the remainder", "{a} % {b}", "remainder of {a} [and|by|over] {b}",
            "<noun>the rest of {a} divided by {b}", "what is left over when {a} is divided by {b}", "<noun>{a} modulo {b}", "{a} in groups of {b}, how many are left over",
        ],
        held: ["give me the remainder when I divide {a} by {b}", "how much is {a} mod {b}", "what is left over if I divide {a} by {b}", "{a} divided by {b}, tell me what remains"],
    }
    SUM3 {
        train: [
            "<do>add {a}, {b} and {c}", "what is {a} plus {b} plus {c}", "{a} + {b} + {c}", "<noun>the sum of {a}, {b} and {c}", "how much do {a}, {b} and {c} make together", "<do>total up {a}, {b} and {c}", "<do>[compute|calculate] {a} + {b} + {c}",
            "{a} plus {b} plus {c}", "{a} and {b} and {c}, how much is that", "{a}, {b}, {c}: what is the [sum|total]", "<do>add up {a}, {b} and {c}", "what do {a}, {b} and {c} [add up|come] to", "<do>put {a}, {b} and {c} together", "sum of {a}, {b} and {c}",
            "<noun>the total of {a}, {b} and {c}", "I paid {a}, {b} and {c}, how much is that [together|in all]", "the numbers are {a}, {b} and {c}. Add them up", "{a} first, then {b}, then {c}: how much in all",
        ],
        held: ["what is the sum of the numbers {a}, {b} and {c}", "how much is {a} plus {b} plus {c}", "what is {a} + {b} + {c}", "add the numbers {a}, {b} and {c}", "I have {a}, {b} and {c}, how much is that together"],
    }
    SUM4 {
        train: [
            "<do>add [up |]{a}, {b}, {c} and {d}", "{a} + {b} + {c} + {d}", "<noun>the sum of {a}, {b}, {c} and {d}", "what do {a}, {b}, {c} and {d} make [together|]", "<noun>the total of {a}, {b}, {c} and {d}", "I paid {a}, {b}, {c} and {d}, how much is that [together|in all]",
            "{a}, {b}, {c}, {d}: what is the [sum|total]", "{a} plus {b} plus {c} plus {d}",
        ],
        held: ["what is {a} + {b} + {c} + {d}", "total up the numbers {a}, {b}, {c} and {d}", "how much do {a}, {b}, {c} and {d} come to", "how much is {a} and {b} and {c} and {d}"],
    }
    PRODUCT3 {
        train: [
            "<do>multiply {a}, {b} and {c}", "{a} times {b} times {c}", "{a} * {b} * {c}", "<noun>the product of {a}, {b} and {c}", "what is {a} x {b} x {c}", "<noun>{a} times {b} times {c}", "a box is {a} long, {b} wide and {c} high, what is its volume",
            "{a} boxes with {b} bags of {c} each, how many is that", "<do>compute {a} * {b} * {c}",
        ],
        held: ["how much is {a} times {b} times {c}", "what is {a} * {b} * {c}", "there are {a} boxes with {b} bags of {c} each, how many are there", "multiply the numbers {a}, {b} and {c}"],
    }
    LESS_TWO {
        train: [
            "{a} minus {b} minus {c}", "{a} - {b} - {c}", "what is left of {a} without {b} and {c}", "I had {a}, paid {b} and {c}, [what is left|how much is left]", "<do>take {b} and {c} [away |off |]from {a}", "from {a} take {b} and then {c}", "<do>subtract {b} and {c} from {a}",
            "{who} had {a} and gave away {b} and then {c}, how many are left", "<noun>{a} minus {b} minus {c}", "of {a} I spent {b} and {c}, how much do I have left",
        ],
        held: ["what is {a} - {b} - {c}", "how much is {a} minus {b} minus {c}", "I have {a} and pay {b} and {c}, how much is left", "start with {a}, take away {b} and then {c}"],
    }
    PLUS_MINUS {
        train: [
            "{a} plus {b} minus {c}", "{a} + {b} - {c}", "I had {a}, got {b} and [spent|lost|gave away] {c}, how many do I have [now|left]", "{a} people were there, {b} came and {c} left, how many are there", "start with {a}, add {b} and [subtract|take away] {c}",
            "what is {a} plus {b} less {c}", "<do>add {b} to {a} and then subtract {c}", "{who} has {a}, finds {b} and loses {c}, how many is that", "there were {a} in the box, I put {b} in and took {c} out, how many are there", "<noun>{a} plus {b} minus {c}",
        ],
        held: ["what is {a} + {b} - {c}", "how much is {a} plus {b} minus {c}", "{who} had {a}, found {b} and lost {c}, how many are left", "I have {a}, get {b} and pay {c}, how much do I have then"],
    }
    BRACKET {
        train: [
            "<do>add {a} and {b}, then multiply by {c}", "<noun>the total of {a} and {b} times {c}", "<do>compute the sum of {a} and {b}, times {c}", "what is ({a} + {b}) * {c}", "<do>multiply the sum of {a} and {b} by {c}", "<do>compute ({a} + {b}) * {c}", "<do>take the sum of {a} and {b} and multiply it by {c}", "({a} + {b}) * {c}",
            "the sum of {a} and {b}, multiplied by {c}", "{a} plus {b}, and that times {c}", "<do>add {a} and {b} and multiply the result by {c}", "first {a} plus {b}, then times {c}", "{a} and {b} together, times {c}", "what do I get when I add {a} and {b} and multiply by {c}",
            "every day I pay {a} for lunch and {b} for the bus, how much is that in {c} days", "{who} pays {a} and {other} pays {b} every month, how much is that in {c} months",
        ],
        held: ["what is the sum of {a} and {b} times {c}", "calculate ({a} + {b}) * {c}", "add {a} and {b} and multiply the sum by {c}", "I pay {a} for the bus and {b} for lunch every day, how much is that in {c} days"],
    }
    TIMES_SUM {
        train: ["{c} times the sum of {a} and {b}", "<do>multiply {c} by the sum of {a} and {b}", "{c} * ({a} + {b})", "what is {c} times the sum of {a} and {b}", "<noun>{c} times the sum of {a} and {b}", "{c} people pay {a} and {b} each, how much is that together"],
        held: ["how much is {c} times the sum of {a} and {b}", "calculate {c} * ({a} + {b})", "take the number {c} times the sum of {a} and {b}", "{c} people each pay {a} and {b}, what is the total"],
    }
    SPLIT {
        train: [
            "<do>add {a} and {b}, then divide by {c}", "({a} + {b}) / {c}", "<do>divide the sum of {a} and {b} by {c}", "{a} and {b} shared by {c} people, how much is each", "we spent {a} and {b} and are {c} people, [what does each pay|how much does each pay]",
            "<do>take the sum of {a} and {b} and divide it by {c}", "the sum of {a} and {b}, divided by {c}", "first {a} plus {b}, then divided by {c}", "{c} of us share a bill of {a} and one of {b}, what does each pay",
        ],
        held: ["what is ({a} + {b}) / {c}", "add {a} and {b} and divide the sum by {c}", "we pay {a} and {b} and share it by {c}, how much is each", "what is the sum of {a} and {b} divided by {c}"],
    }
    AVERAGE2 {
        train: ["<noun>the [average|mean] of {a} and {b}", "average of {a} and {b}", "what is the middle between {a} and {b}", "what do {a} and {b} make on average", "<do>[compute|calculate] the [average|mean] of {a} and {b}", "{a} and {b}: what is the average"],
        held: ["what is the average of the numbers {a} and {b}", "how much is the mean of {a} and {b}", "how much are {a} and {b} on average", "the mean of the two numbers {a} and {b}"],
    }
    AVERAGE3 {
        train: [
            "<noun>the [average|mean] of {a}, {b} and {c}", "average of {a}, {b} and {c}", "what do {a}, {b} and {c} make on average", "<do>[compute|calculate] the [average|mean] of {a}, {b} and {c}", "{a}, {b} and {c}: what is the average",
            "I walked {a}, {b} and {c} on three days, how much is that on average",
        ],
        held: ["what is the average of the numbers {a}, {b} and {c}", "how much is the mean of {a}, {b} and {c}", "how much are {a}, {b} and {c} on average", "the mean of the numbers {a}, {b} and {c}"],
    }
    TIMES_MORE {
        train: [
            "{a} times {b} plus {c}", "{a} * {b} + {c}", "<do>multiply {a} by {b} and add {c}", "{a} {x}s at {b} each and {c} for the [rest|bag|post], what do I pay", "I buy {a} of them for {b} each and pay {c} for the post, how much is that", "<noun>{a} times {b} plus {c}",
            "what is {a} times {b}, plus {c}", "{who} works {a} hours for {b} each and gets {c} on top, how much is that", "there are {a} boxes of {b} each and {c} more, how many is that", "first {a} times {b}, then plus {c}",
        ],
        held: ["what is {a} * {b} + {c}", "how much is {a} times {b} plus {c}", "I buy {a} {x}s at {b} each and pay {c} for the bag, how much is that", "there are {a} boxes of {b} each and {c} on top, how many are there"],
    }
    TIMES_LESS {
        train: [
            "{a} times {b} minus {c}", "{a} * {b} - {c}", "<do>multiply {a} by {b} and subtract {c}", "{a} {x}s at {b} each, and {c} off, what do I pay", "there were {a} boxes of {b} each, and {c} were broken, how many are left", "<noun>{a} times {b} minus {c}",
            "what is {a} times {b}, less {c}", "{who} sold {a} {x}s at {b} each and paid {c} for the stand, how much is left", "{a} rows of {b} chairs, {c} are taken, how many are free",
        ],
        held: ["what is {a} * {b} - {c}", "how much is {a} times {b} minus {c}", "I sold {a} {x}s at {b} each and paid {c}, how much is left", "there are {a} boxes of {b} each and {c} are taken, how many are left"],
    }
    CHANGE {
        train: [
            "I pay with {c} for {a} {x}s at {b} each, how much do I get back", "I have {c} and buy {a} {x}s at {b} each, how much is left", "{who} has {c} and buys {a} of them for {b} each, what is left", "from {c} I pay {a} times {b}, how much is left", "{c} minus {a} times {b}",
            "{c} - {a} * {b}", "I had {c} and spent {b} on {a} days each, how much do I have left", "out of {c} I gave {a} people {b} each, what is left",
        ],
        held: ["{who} has {c} and buys {a} {x}s at {b} each, how much is left", "what is {c} minus {a} times {b}", "I pay {a} times {b} from {c}, what is left", "I had {c} and gave {a} people {b} each, how much do I have left"],
    }
    TWO_BUYS {
        train: [
            "{a} {x}s at {b} each and {c} {y}s at {d} each, what is the total", "I buy {a} {x}s for {b} each and {c} {y}s for {d} each, how much is that", "{a} times {b} plus {c} times {d}", "{a} * {b} + {c} * {d}", "{who} buys {a} at {b} and {c} at {d}, what does it cost",
            "how much do I pay for {a} {x}s at {b} and {c} {y}s at {d}", "{a} boxes of {b} and {c} boxes of {d}, how many is that", "<do>add {a} times {b} and {c} times {d}", "{a} people pay {b} and {c} people pay {d}, how much is that together",
        ],
        held: ["what is {a} * {b} + {c} * {d}", "{who} buys {a} {x}s at {b} each and {c} {y}s at {d} each, how much is that", "how much is {a} times {b} plus {c} times {d}", "{a} boxes of {b} and {c} boxes of {d}, how many are there"],
    }
    DOUBLE {
        train: ["<do>double {a}", "<noun>twice {a}", "twice {a}", "<noun>the double of {a}", "what is {a} doubled", "how much is twice {a}", "two times {a}", "I have {a} and need twice as [much|many], how [much|many] is that", "what is double {a}"],
        held: ["how much is double {a}", "what is the number {a} doubled", "what is two times {a}", "I have {a} and want twice as much, how much is it"],
    }
    HALF {
        train: ["<noun>half of {a}", "half of {a}", "how much is half of {a}", "<do>halve {a}", "what is one half of {a}", "half {a} is how much", "I have {a} and give away half, how much is that", "<do>take half of {a}", "half the price of {a}"],
        held: ["what is the half of {a}", "how much is one half of {a}", "I want half of {a}, how much is it", "what do I get when I halve {a}"],
    }
    THIRD {
        train: ["<noun>[a|one] third of {a}", "a third of {a}", "how much is a third of {a}", "the third part of {a}", "<do>take a third of {a}", "what is one third of {a}"],
        held: ["what is the third part of {a}", "how much is one third of {a}", "I want a third of {a}, how much is it", "what do I get when I take one third of {a}"],
    }
    UNITS {
        train: [
            "how many {to} are {a} {from}", "how many {to} are [there |]in {a} {from}", "<do>convert {a} {from} [to|into] {to}", "{a} {from} in {to}", "<noun>{a} {from} in {to}", "what are {a} {from} in {to}", "how many {to} do {a} {from} have", "<do>turn {a} {from} into {to}",
            "<know>how many {to} {a} {from} are", "{a} {from} to {to}", "{a} {from} make how many {to}",
        ],
        held: ["how many {to} do {a} {from} make", "what is {a} {from} in {to}", "tell me how many {to} there are in {a} {from}", "calculate {a} {from} in {to}"],
    }
    BUY {
        train: [
            "I buy {a} of these at {b} each, what do I pay", "{who} buys {a} at {b} each, what is the total", "how much do I pay for {a} when each costs {b}", "there are {a} boxes of {b} each, how many is that", "{a} people pay {b} each, how much is that together",
            "{a} {x}s at {b} each, [what do I pay|how much is that|what is the total]", "what do {a} {x}s cost at {b} each", "how much are {a} {x}s at {b} each", "{who} works {a} hours for {b} [each|an hour], [what does {who} get|how much is that]", "{a} rows with {b} chairs, how many chairs are there",
            "I save {a} [a|every] month, how much is that after {b} months", "{who} runs {a} km every day, how far is that in {b} days", "what is the price of {a} {x}s when one costs {b}", "{a} bags, {b} in each, how many in all", "a room is {a} long and {b} wide, what is its area",
            "I need {a} {x}s, each costs {b}, how much is that", "for {a} days at {b} a day, what do I pay", "{a} tickets at {b} [euros|dollars|] each, how much", "{a} packs of {b} {x}s, how many {x}s are there", "we are {a} and each pays {b}, how much do we pay",
            "I drive {a} km on each of {b} days, how far is that",
        ],
        held: ["{who} buys {a} boxes at {b} each, how much is that", "I need {a} {x}s and one costs {b}, how much do I pay", "we are {a} people and each pays {b}, how much is that together", "{a} boxes with {b} {x}s in each, how many are there"],
    }
    EACH {
        train: [
            "one {x} costs {b}, how much do {a} cost", "a {x} costs {b}. What do {a} of them cost", "each {x} weighs {b}, how much do {a} weigh", "a {x} is {b}, what do I pay for {a}", "[at|for] {b} each, how much are {a} {x}s", "one box holds {b}, how many do {a} boxes hold",
            "if one {x} costs {b}, what do {a} cost", "the price is {b} for one {x}, how much are {a}", "{who} earns {b} an hour and works {a} hours, how much is that", "a ticket is {b}, we are {a} people, what do we pay",
        ],
        held: ["each {x} costs {b}. How much do I pay for {a}", "a {x} weighs {b}, what do {a} of them weigh", "one {x} is {b}, how much do {a} of them cost", "one ticket costs {b}, what do {a} people pay"],
    }
    MORE {
        train: [
            "{who} has {a} and gets {b} more, how many is that", "I had {a} and found {b}, how many do I have", "there were {a} people and {b} came, how many are there", "I pay {a} for the {x} and {b} for the rest, what is the total",
            "{who} has {a} coins and I have {b}, how many are there together", "the {x} costs {a} and the {y} {b}, what [do they cost|is that] together", "I walked {a} yesterday and {b} today, how [much|far] is that", "{a} in one box and {b} in the other, how many in all",
            "I have {a} {x}s, {who} gives me {b} more, how many do I have", "{who} paid {a}, {other} paid {b}, how much is that together", "we sold {a} on the first day and {b} on the second, how many is that", "first I got {a}, then {b}, how much do I have", "my rent is {a} and the power costs {b}, what do I pay in all",
            "{a} came by bus and {b} by train, how many came", "a {x} for {a} and a {y} for {b}, what do I pay", "there are {a} here and {b} there, how many is that together", "{who} read {a} pages and then {b} more, how many pages is that", "I need {a} for food and {b} for fuel, how much is that",
        ],
        held: [
            "I have {a} and get {b} more, how many do I have", "{who} had {a} coins and found {b}, how many are there", "I pay {a} for a {x} and {b} for the rest, how much is that together", "{who} has {a} {x}s and {other} has {b}, how many are there together",
            "I paid {a} for food and {b} for the train, what is the total",
        ],
    }
    LEFT {
        train: [
            "{who} has {a} and gives away {b}, how many are left", "I had {a} and lost {b}, what is left", "of {a} people {b} left, how many are there", "I have {a} and pay {b} for a {x}, how much do I have left", "there were {a} in the box and {who} took {b}, how many remain",
            "I had {a} and spent {b}, [how much is left|what is left|how much do I have now]", "a bag weighs {a} and {b} are taken out, what does it weigh", "{who} had {a} {x}s and sold {b}, how many are left", "out of {a} {x}s {b} are broken, how many are good", "the way is {a} km, I walked {b}, how far is it",
            "{a} were there and {b} went home, how many stayed", "I pay {b} of my {a}, how much is left", "the price was {a}, I got {b} off, what did I pay", "{who} wants to save {a} and has {b}, how much is missing", "a book has {a} pages, I read {b}, how many are left", "I borrowed {a} and gave back {b}, how much do I owe",
            "there were {a} seats, {b} are taken, how many are free",
        ],
        held: ["{who} had {a} and lost {b}, how many are left", "I had {a} and gave away {b}, how many do I have left", "there were {a} and {who} took {b}, how many are left", "I have {a} {x}s and sold {b} of them, how many remain", "there are {a} seats and {b} people came, how many seats are left"],
    }
    WRITTEN {
        train: [
            "{x}", "{x}", "<do>compute {x}", "[what is|what's] {x}", "<do>calculate {x}", "<do>evaluate {x}", "{x}, how much is that", "<do>[work|figure] out {x}", "<do>solve {x}", "how much is {x}", "<noun>the value of {x}", "[result|value] of {x}", "{x} = ?", "{x} =",
            "<noun>the result of {x}", "what does {x} [make|give|come to]", "<know>how much {x} is", "[calculator|math]: {x}", "use the calculator: {x}", "here is one: {x}", "{x} is how much", "what comes out of {x}", "I get stuck at {x}, what is it", "<do>find the value of {x}",
            "what do I get for {x}", "[do|run] this: {x}", "quick: {x}", "the expression {x}: what is [it|its value]", "<do>work out the expression {x}",
        ],
        held: ["what is the value of the expression {x}", "calculate the value of {x}", "tell me what {x} is", "I need the result of this: {x}", "what do you get for {x}", "use the calculator and work out {x}"],
    }
}

/// An operation: its wording, the expression, and the digits of its numbers at the most.
struct Operation {
    form: &'static Form,
    expression: &'static str,
    digits: [u32; 4],
    /// Some numbers have decimals.
    decimals: bool,
}

const fn operation(form: &'static Form, expression: &'static str, digits: [u32; 4], decimals: bool) -> Operation {
    Operation { form, expression, digits, decimals }
}

static OPERATIONS: [Operation; 33] = [
    operation(&SUM, "{a} + {b}", [6, 6, 2, 2], true),
    operation(&DIFFERENCE, "{a} - {b}", [6, 6, 2, 2], true),
    operation(&FROM, "{a} - {b}", [6, 6, 2, 2], true),
    operation(&PRODUCT, "{a} * {b}", [5, 4, 2, 2], true),
    operation(&PERCENT, "{a} * {b} / 100", [2, 5, 2, 2], true),
    operation(&PERCENT, "{a} * {b} / 100", [2, 5, 2, 2], true),
    operation(&OF_PERCENT, "{b} * {a} / 100", [2, 5, 2, 2], true),
    operation(&PERCENT_MORE, "{b} + {b} * {a} / 100", [2, 4, 2, 2], false),
    operation(&PERCENT_LESS, "{b} - {b} * {a} / 100", [2, 4, 2, 2], false),
    operation(&SQUARE, "{a} ^ 2", [5, 2, 2, 2], true),
    operation(&REST, "{a} % {b}", [5, 3, 2, 2], false),
    operation(&SUM3, "{a} + {b} + {c}", [5, 5, 5, 2], true),
    operation(&SUM4, "{a} + {b} + {c} + {d}", [4, 4, 4, 4], true),
    operation(&PRODUCT3, "{a} * {b} * {c}", [3, 3, 3, 2], false),
    operation(&LESS_TWO, "{a} - {b} - {c}", [5, 4, 4, 2], true),
    operation(&PLUS_MINUS, "{a} + {b} - {c}", [5, 4, 4, 2], true),
    operation(&BRACKET, "({a} + {b}) * {c}", [4, 4, 3, 2], true),
    operation(&TIMES_SUM, "{c} * ({a} + {b})", [4, 4, 3, 2], true),
    operation(&AVERAGE2, "({a} + {b}) / 2", [5, 5, 2, 2], true),
    operation(&AVERAGE3, "({a} + {b} + {c}) / 3", [4, 4, 4, 2], false),
    operation(&TIMES_MORE, "{a} * {b} + {c}", [3, 4, 4, 2], true),
    operation(&TIMES_LESS, "{a} * {b} - {c}", [3, 4, 4, 2], true),
    operation(&CHANGE, "{c} - {a} * {b}", [2, 3, 5, 2], true),
    operation(&TWO_BUYS, "{a} * {b} + {c} * {d}", [3, 3, 3, 3], true),
    operation(&DOUBLE, "{a} * 2", [6, 2, 2, 2], true),
    operation(&HALF, "{a} / 2", [6, 2, 2, 2], true),
    operation(&BUY, "{a} * {b}", [3, 4, 2, 2], true),
    operation(&BUY, "{a} * {b}", [3, 4, 2, 2], true),
    operation(&EACH, "{a} * {b}", [3, 4, 2, 2], true),
    operation(&MORE, "{a} + {b}", [5, 5, 2, 2], true),
    operation(&MORE, "{a} + {b}", [5, 5, 2, 2], true),
    operation(&LEFT, "{a} - {b}", [5, 4, 2, 2], true),
    operation(&LEFT, "{a} - {b}", [5, 4, 2, 2], true),
];

/// Units, and how many of the second one make the first.
const UNITS_OF: [(&str, &str, u32); 10] = [
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("euros", "cents", 100),
    ("metres", "centimetres", 100),
];

/// A number: as it stands in the expression.
fn number(side: Side, digits: u32, decimals: bool, draw: &mut Draw) -> String {
    match decimals && draw.chance(20) {
        true => names::decimal(draw, side),
        false => names::figure(draw, side, digits).to_string(),
    }
}

/// A number as people write it: now and then in words, and `12,480` for `12480`, the latter in training data alone.
fn shown(number: &str, side: Side, draw: &mut Draw) -> String {
    if draw.chance(5)
        && let Some(words) = names::spelled(number)
    {
        return words;
    }
    grouped(number, side, draw)
}

/// The same in digits alone.
fn grouped(number: &str, side: Side, draw: &mut Draw) -> String {
    let plain = number.len() > 3 && number.bytes().all(|b| b.is_ascii_digit());
    if side == Side::Train && plain && draw.chance(6) {
        let (head, tail) = number.split_at(number.len() - 3);
        return format!("{head},{tail}");
    }
    number.to_string()
}

/// A request of `form` with these numbers.
fn asked(form: &Form, numbers: &[(&str, &str)], side: Side, draw: &mut Draw) -> String {
    // Words do not go with signs: "twelve%".
    let signs = form.of(side).iter().any(|template| template.contains('%') || template.contains('('));
    let shown = if signs { grouped } else { shown };
    let numbers: Vec<(&str, String)> = numbers.iter().map(|&(name, n)| (name, shown(n, side, draw))).collect();
    let (who, other) = (names::person(draw, side), names::person(draw, side));
    let (x, y) = (names::thing(draw, side), names::thing(draw, side));
    let mut slots: Vec<(&str, &str)> = numbers.iter().map(|(name, n)| (*name, n.as_str())).collect();
    slots.extend([("who", who.as_str()), ("other", &other), ("x", &x), ("y", &y)]);
    form.request(side, &slots, draw)
}

/// A request and its expression.
pub fn question(side: Side, draw: &mut Draw) -> (String, String) {
    match draw.below(OPERATIONS.len() + 14) {
        0..=3 => {
            let x = written(side, draw);
            (WRITTEN.request(side, &[("x", &x)], draw), x)
        }
        at @ 4..=7 => {
            // Divisions come out even, but for some of the training data.
            let b = names::figure(draw, side, 3);
            let a = match side == Side::Train && draw.chance(25) {
                true => names::figure(draw, side, 5).to_string(),
                false => names::number_of(draw, side, |draw| b * draw.range(2, 999)).to_string(),
            };
            let b = b.to_string();
            let form = if at == 7 { &GOES_INTO } else { &QUOTIENT };
            (asked(form, &[("a", &a), ("b", &b)], side, draw), format!("{a} / {b}"))
        }
        8 => {
            let a = names::number_of(draw, side, |draw| draw.range(4, 999).pow(2)).to_string();
            (asked(&ROOT, &[("a", &a)], side, draw), format!("sqrt({a})"))
        }
        9 => {
            let a = names::number_of(draw, side, |draw| 3 * draw.range(4, 9999)).to_string();
            (asked(&THIRD, &[("a", &a)], side, draw), format!("{a} / 3"))
        }
        10 => {
            let c = names::figure(draw, side, 2);
            let a = names::figure(draw, side, 4);
            // What makes the sum even is not known to be of this side: it is drawn until it is.
            let b = names::number_of(draw, side, |draw| (c - a % c) + c * draw.range(1, 99));
            let [a, b, c] = [a, b, c].map(|n| n.to_string());
            (asked(&SPLIT, &[("a", &a), ("b", &b), ("c", &c)], side, draw), format!("({a} + {b}) / {c}"))
        }
        11 => {
            let (a, b) = (names::figure(draw, side, 3).to_string(), draw.range(3, 9).to_string());
            (asked(&POWER, &[("a", &a), ("b", &b)], side, draw), format!("{a} ^ {b}"))
        }
        12 | 13 => {
            let (from, to, factor) = *draw.pick(&UNITS_OF);
            let a = number(side, 4, true, draw);
            let shown = shown(&a, side, draw);
            let request = UNITS.request(side, &[("a", &shown), ("from", from), ("to", to)], draw);
            (request, format!("{a} * {factor}"))
        }
        at => {
            let operation = &OPERATIONS[at - 14];
            let [a, b, c, d] = operation.digits.map(|digits| number(side, digits, operation.decimals, draw));
            let slots: &Slots = &[("a", a.as_str()), ("b", &b), ("c", &c), ("d", &d)];
            (asked(operation.form, slots, side, draw), expand(operation.expression, slots, draw))
        }
    }
}

/// An expression as people write it.
pub fn written(side: Side, draw: &mut Draw) -> String {
    let gap = if draw.chance(50) { " " } else { "" };
    let decimals = draw.chance(25);
    let digits = draw.range(2, 4) as u32;
    let mut text = number(side, digits, decimals, draw);
    for _ in 0..draw.range(1, 4) {
        let sign = *draw.pick(&["+", "-", "*", "+", "*"]);
        let right = if draw.chance(30) {
            let inner = *draw.pick(&["+", "-"]);
            format!(
                "({}{gap}{inner}{gap}{})",
                number(side, digits, decimals, draw),
                number(side, digits, decimals, draw)
            )
        } else {
            number(side, digits, decimals, draw)
        };
        let compound = text.contains(['+', '-', '*']);
        text = if compound && draw.chance(25) {
            format!("({text}){gap}{sign}{gap}{right}")
        } else {
            format!("{text}{gap}{sign}{gap}{right}")
        };
    }
    // Divisions and powers come last, with small numbers.
    match draw.below(10) {
        0 => format!("({text}){gap}/{gap}{}", draw.pick(&[2, 4, 5, 8])),
        1 if !decimals => format!("{}{gap}^{gap}{}", number(side, 2, false, draw), draw.range(2, 5)),
        2 => format!("sqrt({})", names::number_of(draw, side, |draw| draw.range(4, 999).pow(2))),
        _ => text,
    }
}

/// A call of the calculator.
pub fn compute(expression: &str) -> Action {
    Action::call("calculator", &[("expression", expression.into())])
}

/// The answer that gives its result.
pub fn result(result: &str) -> Action {
    Action::say(format!("The result is {result}."), &[result])
}

/// See the [module](self).
pub fn task(side: Side, draw: &mut Draw) -> Task {
    let (request, expression) = question(side, draw);
    Task::single(request, compute(&expression), result)
}
