// What llama.cpp does with a GGUF file: reads {model, texts, ids} as JSON on stdin, prints as JSON the tokens of texts, and
// after each of ids the 50 highest logits, [[token, logit], ...]. The argument is the folder of the npm package
// node-llama-cpp, which has llama.cpp in it.
const {getLlama} = await import(process.argv[2] + '/dist/index.js');
let input = '';
for await (const chunk of process.stdin) {
    input += chunk;
}
const {model: modelPath, texts, ids} = JSON.parse(input);
const llama = await getLlama({gpu: false, build: 'never', logLevel: 'error'});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: Math.min(512, model.trainContextSize), threads: 2, flashAttention: false,
    experimentalKvCacheKeyType: 'F32', experimentalKvCacheValueType: 'F32',
});
const wanted = {generateNext: {logits: {filter: {tokens: [], includeTop: 50}}}};
const outputs = await context.getSequence().controlledEvaluate(ids.map(id => [id, wanted]));
const found = {
    plain: texts.map(text => model.tokenize(text, false)),
    special: texts.map(text => model.tokenize(text, true)),
    logits: outputs.map(output => [...output.next.logits]),
    context: model.trainContextSize, eos: model.tokens.eos, addsBos: model.tokens.shouldPrependBosToken,
};
process.stdout.write(JSON.stringify(found), () => process.exit(0));
